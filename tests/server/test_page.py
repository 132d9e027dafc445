"""The page at `/` and `/docs`: complete in itself, asks no other site, needs no inline script."""

import re
from importlib.resources import files

import pytest
from quire_server.middleware import PAGE
from quire_server.routes.page import ASSETS, TYPES

FOLDER = files("quire_server") / "page"
TEXTS = {file.name: file.read_text() for file in FOLDER.iterdir() if file.name.rpartition(".")[2] in TYPES}
PAGES = {"/": ("index.html", ("page.js", "engine.js")), "/docs": ("docs.html", ("docs.js",))}


def test_every_file_is_served_and_needs_no_key(http):
    assert set(TEXTS) == ASSETS | {"index.html", "docs.html"}
    assert {f"/page/{name}" for name in ASSETS} | {"/", "/docs"} == PAGE
    for path in PAGE:
        answer = http.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/page/page.js").headers["content-type"].startswith("text/javascript")
    for path in ("/page/other.js", "/page/..%2fapp.py", "/page/"):
        assert http.get(path).status_code == 404


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_asked_of_other_sites_and_nothing_is_inline(name):
    text = TEXTS[name]
    assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text, re.IGNORECASE)
    assert "innerHTML" not in text
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", text)


@pytest.mark.parametrize("path", PAGES)
def test_scripts_and_pages_agree(path):
    page, scripts = PAGES[path]
    html = TEXTS[page]
    ids = set(re.findall(r'id="([\w-]+)"', html))
    used = {name for script in scripts for name in re.findall(r'at\("([\w-]+)"\)', TEXTS[script])}
    if path == "/":
        used |= set(re.search(r"NUMBERS = \[(.*?)\]", TEXTS["page.js"])[1].replace('"', "").replace(" ", "").split(","))
        used |= set(re.findall(r"^    (\w+): ", TEXTS["engine.js"], re.MULTILINE))
        assert {"running", "hits", "grid", "queue"} <= used
    assert used <= ids
    linked = set(re.findall(r'(?:src|href)="(page/[\w.]+)"', html))
    assert {target.removeprefix("page/") for target in linked} <= ASSETS


@pytest.mark.parametrize("script", [name for name in TEXTS if name.endswith(".js")])
def test_scripts_import_what_there_is(script):
    imported = re.findall(r'import \{ (.*?) \} from "\./([\w.]+)"', TEXTS[script])
    assert len(imported) == TEXTS[script].count(' from "')
    for names, module in imported:
        assert module in ASSETS
        for name in names.split(", "):
            assert re.search(rf"export (?:async )?(?:function\*? |class ){name}\b", TEXTS[module])


def test_what_the_page_reads_of_the_engine_is_told(http):
    view = http.get("/engine").json()
    scripts = TEXTS["engine.js"] + TEXTS["grid.js"] + TEXTS["steps.js"]
    read = {name for _, name in re.findall(r"\b(view|one|step)\.(\w+)", scripts)}
    of_sequences = {"sequence_id", "status", "num_prompt_tokens", "num_tokens", "block_ids"}
    of_steps = {"step_id", "num_tokens", "num_sampled"}
    assert read - of_sequences - of_steps <= view.keys()
    assert len(read) > 14
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert of_steps <= http.get("/engine").json()["steps"][-1].keys()


def test_the_fields_that_the_page_sends_are_known(http):
    body = {
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 3,
        "seed": 1,
        "chat_template_kwargs": {"enable_thinking": True},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "x-quire-ignored-fields" not in answer.headers
    assert answer.text.endswith("data: [DONE]\n\n")
