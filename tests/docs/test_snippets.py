"""Every Python, YAML and `quire` snippet of README and docs is run, and its output compared where it is given."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
"""The first line of a block that is a file; `test_written_plugin` writes those."""
LIVE = {ROOT / "docs" / "server.md"}
"""Pages whose snippets need a running server; test_server_page.py runs those."""
OWN_TEST = {ROOT / "docs" / "plugins" / "tutorial.md"}
"""Pages that build on their own snippets, one after the other; test_tutorial.py follows it."""
DOCS = {*ROOT.glob("docs/*.md"), *ROOT.glob("docs/plugins/*.md")}
PAGES = sorted({ROOT / "README.md", *ROOT.glob("scripts/tiny/*.md"), *DOCS} - LIVE - OWN_TEST)


def blocks(page):
    return FENCE.findall(page.read_text(encoding="utf-8"))


def cases(language):
    found = []
    for page in PAGES:
        listed = blocks(page)
        for index, (kind, text) in enumerate(listed):
            if kind == language and not FILE.match(text):
                after = listed[index + 1] if index + 1 < len(listed) else ("", "")
                expected = after[1] if after[0] == "text" else None
                found.append(pytest.param(text, expected, id=f"{page.name}-{index}"))
    return found


def run(*arguments, cwd):
    answer = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


@pytest.mark.parametrize(("text", "expected"), cases("python"))
def test_python(text, expected, tmp_path):
    assert expected is not None, "a program's output belongs below it"
    (tmp_path / "snippet.py").write_text(text)
    assert run("snippet.py", cwd=tmp_path) == expected


def test_written_plugin(tmp_path):
    files = {}
    for language, text in blocks(ROOT / "README.md"):
        name = FILE.match(text)
        if language == "python" and name is not None:
            files[name[1]] = text
    assert set(files) == {"dense.py", "test_dense.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert len(files["dense.py"].splitlines()) <= 42
    (line,) = re.findall(r"`quire (--plugin dense\.py run .*?)`", (ROOT / "README.md").read_text())
    answer = run("-m", "quire.cli", *line.replace('"', "").split(" "), "--temperature", "0", cwd=tmp_path)
    assert "72" in answer
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_dense.py", cwd=tmp_path)


def test_written_quantization_method(tmp_path):
    page = ROOT / "docs" / "quantization.md"
    (text,) = [text for language, text in blocks(page) if language == "python" and FILE.match(text)]
    (tmp_path / FILE.match(text)[1]).write_text(text)
    lines = re.findall(r"`quire (--plugin row8\.py .*?)`", page.read_text())
    answers = [run("-m", "quire.cli", *shlex.split(line), cwd=tmp_path) for line in lines]
    assert "72" in answers[0]
    assert "certified" in answers[1]


def test_hooks_as_the_reference_writes_them(tmp_path):
    """One plugin of all of them loads where a misspelt or wrongly declared hook is an error."""
    hooks = [text for language, text in blocks(ROOT / "docs" / "reference" / "hooks.md") if language == "python"]
    assert len(hooks) >= 5
    header = "from __future__ import annotations\nfrom quire.plugin import hookimpl\n"
    (tmp_path / "all_hooks.py").write_text(
        header + "\n".join(hooks).replace("Iterable[Provider]: ...", "Iterable[Provider]: return []")
    )
    shown = run(
        "-m", "quire.cli", "--strict-plugins", "--plugin", "all_hooks.py", "plugins", "list", "--json", cwd=tmp_path
    )
    assert "all_hooks" in shown
    (tmp_path / "misspelt.py").write_text(header + hooks[0].replace("def quire_", "def quire_x_"))
    with pytest.raises(AssertionError, match="quire_x_"):
        run("-m", "quire.cli", "--strict-plugins", "--plugin", "misspelt.py", "plugins", "list", cwd=tmp_path)


def quire_lines():
    found = []
    for page in PAGES:
        for language, text in blocks(page):
            if language == "bash":
                found += [line for line in text.splitlines() if line.startswith("quire ")]
    return found


@pytest.mark.parametrize("line", quire_lines())
def test_commands(line, tmp_path):
    assert run("-m", "quire.cli", *line.split()[1:], cwd=tmp_path)


@pytest.mark.parametrize(("text", "expected"), cases("yaml"))
def test_configuration_files(text, expected, tmp_path):
    (tmp_path / "quire.yaml").write_text(text)
    shown = run("-m", "quire.cli", "-c", "quire.yaml", "config", "show", "--json", cwd=tmp_path)
    assert ('"radix"' in shown) == ("radix" in text)
    assert "quire.yaml" in shown


def test_commands_of_the_readme_set_everything_up():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith('quire run "What is 27+45?"')
    assert commands[1].endswith("-m pytest")
    assert commands[1] in (ROOT / "README.md").read_text()
    assert all("-c constraints.txt" in command for command in commands)
