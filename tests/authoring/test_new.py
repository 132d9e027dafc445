"""`quire plugins new`: what it writes works as it is, and what it cannot write it refuses with the mend."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from quire.contract.provider import POINTS
from quire.errors import ConfigError
from quire.registry import HostOptions, build_host
from quire.scaffold import TEMPLATES, PluginName, licenses, new_plugin, points

POINTS_WITH_TEMPLATES = [
    "attention",
    "scheduler_policy",
    "sampler",
    "logits_processor",
    "quantization",
    "model",
    "output_parser",
    "metrics_sink",
]
PROJECT = {"license": "MIT", "holder": "Ada Example", "year": 2026}


def test_the_points_with_templates():
    assert set(points()) == set(POINTS_WITH_TEMPLATES)
    assert licenses() == ["Apache-2.0", "MIT"]


def test_all_are_found_and_offer_what_they_are_named_for(written, monkeypatch):
    monkeypatch.syspath_prepend(str(written / "site"))
    host = build_host(HostOptions(strict=True))
    for point in POINTS_WITH_TEMPLATES:
        report = host.reports[f"my-{point}"]
        (provider,) = report.providers
        assert (provider.point, provider.name) == (point, f"my-{point}")
        assert report.distribution == f"quire-my-{point}".replace("_", "-")
        assert (provider.options is None) == (point == "model")


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[pytest.mark.slow] * (p != "metrics_sink")) for p in POINTS_WITH_TEMPLATES]
)
def test_installed_it_is_certified(written, run, point):
    shown = run("-m", "quire.cli", "plugins", "test", f"my-{point}", "--json", cwd=written, site=written / "site")
    (score,) = json.loads(shown[shown.index("[") : shown.rindex("]") + 1])
    assert (score["verdict"], score["failed"]) == ("certified", 0), score


def test_each_configuration_selects_its_plugin(written, tmp_path, run):
    """All of them in one engine: what a file of theirs says is in use, options too."""
    script = (
        "import sys, pathlib, yaml, json\n"
        "from quire import LLM, SamplingParams\n"
        "names, options = {}, {}\n"
        "for file in sys.argv[1:]:\n"
        "    given = yaml.safe_load(pathlib.Path(file).read_text())\n"
        "    options |= given['plugins'].pop('options')\n"
        "    names |= given['plugins'] | given.get('model', {})\n"
        "names['attention_backend'] = names.pop('attention')\n"
        "llm = LLM(**names, plugin_options=options)\n"
        "out = llm.generate('2+2=', SamplingParams(max_tokens=4, seed=1), use_tqdm=False)\n"
        "assert out[0].outputs[0].token_ids\n"
        "print(json.dumps(names))\n"
    )
    files = [str(written / point / "quire.yaml") for point in POINTS_WITH_TEMPLATES if point != "model"]
    (tmp_path / "all.py").write_text(script)
    shown = run("all.py", *files, cwd=tmp_path, site=written / "site")
    assert '"sampler": "my-sampler"' in shown
    assert "is not in use" not in shown


@pytest.mark.slow
def test_generated_code_is_typed_and_tidy(written, run):
    packages = [str(path) for path in written.glob("*/quire_my_*") if path.parent.name != "site"]
    run("-m", "mypy", "--strict", *packages, cwd=written)
    run("-m", "ruff", "format", "--check", "--line-length", "120", "--exclude", "site", ".", cwd=written)
    rules = "E,F,W,I,B,UP,SIM,RUF,PT,C4,PIE,RET"
    for point in POINTS_WITH_TEMPLATES:
        run("-m", "ruff", "check", "--isolated", "--line-length", "120", "--select", rules, ".", cwd=written / point)


def test_what_is_written(tmp_path):
    files = new_plugin("sampler", "fast_one", tmp_path / "here", license="Apache-2.0", holder="Ada", year=2026)
    names = {str(file.relative_to(tmp_path / "here")) for file in files}
    assert names == {
        ".github/workflows/test.yml",
        ".gitignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "quire.yaml",
        "quire_fast_one/__init__.py",
        "quire_fast_one/py.typed",
        "quire_fast_one/sampler.py",
        "tests/test_plugin.py",
    }
    project = tomllib.loads((tmp_path / "here" / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["license"]) == ("quire-fast-one", "Apache-2.0")
    assert project["entry-points"]["quire"] == {"fast_one": "quire_fast_one"}
    assert "class FastOneSampler(" in (tmp_path / "here" / "quire_fast_one" / "sampler.py").read_text()
    assert all(re.search(r"@[a-z_]+@", file.read_text()) is None for file in files)


def test_the_license_names_its_holder(tmp_path):
    new_plugin("sampler", "mine", tmp_path / "mine", **PROJECT)
    assert "Copyright (c) 2026 Ada Example" in (tmp_path / "mine" / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("point", "name", "words"),
    [
        ("atention", "mine", "did you mean 'attention'?"),
        ("executor", "mine", "without a template"),
        ("sampler", "Mine", "small letters"),
        ("sampler", "1st", "such as mine"),
        ("sampler", "my attention", "such as mine or fast-window"),
        ("sampler", "a--b", "joined by '-' or '_'"),
        ("sampler", "a" * 41, "at most 40"),
        ("sampler", "", "small letters"),
        ("sampler", "../up", "cannot be a plugin's name"),
        ("sampler", "auto", "taken by Quire itself"),
        ("sampler", "core", "taken by Quire itself"),
        ("sampler", "server", "'quire_server' is installed already"),
    ],
)
def test_bad_names_are_told_what_is_allowed(point, name, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        new_plugin(point, name, tmp_path / "x", **PROJECT)
    assert words in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_an_unknown_license_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Apache-2\.0, MIT"):
        new_plugin("sampler", "mine", tmp_path, **PROJECT | {"license": "BSD"})


@pytest.mark.parametrize("obstacle", ["file", "folder with a file"])
def test_nothing_is_overwritten(obstacle, tmp_path):
    target = tmp_path / "mine"
    kept = target if obstacle == "file" else target / "README.md"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(ConfigError, match="--dir"):
        new_plugin("sampler", "mine", target, **PROJECT)
    assert kept.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_used(tmp_path):
    assert len(new_plugin("sampler", "mine", tmp_path, **PROJECT)) == 10


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, quire):
    monkeypatch.chdir(tmp_path)
    code, shown, _ = quire("plugins", "new", "sampler", "mine", "--author", "Ada")
    assert code == 0
    assert "quire-mine/quire_mine/sampler.py" in shown
    assert "cd quire-mine && pip install -e '.[test]' && quire plugins test mine" in shown
    assert "Ada" in (tmp_path / "quire-mine" / "LICENSE").read_text()


def test_every_word_of_the_templates_is_known():
    """So that rendering cannot fail for one point only."""
    known = {"point", "license", "holder", "year", "name", "distribution", "package", "class", "quire_version"}
    for file in TEMPLATES.rglob("*.template"):
        assert set(re.findall(r"@([a-z_]+)@", file.read_text())) <= known, file


def test_names_that_are_made_of_a_name():
    names = PluginName("my-fast_window")
    assert (names.distribution, names.package, names.prefix) == (
        "quire-my-fast-window",
        "quire_my_fast_window",
        "MyFastWindow",
    )


def test_templates_are_there_only_for_points():
    folders = {path.name for path in TEMPLATES.iterdir()} - {"common", "licenses"}
    assert folders <= set(POINTS)
