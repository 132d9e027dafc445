"""The four example plugins are what third parties could write: own distributions, one door, few lines."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from quire import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "plugins").glob("quire-*"))
DOORS = {"quire.plugin"}
OTHERS = {"torch", "pydantic"} | set(sys.stdlib_module_names)


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_there_are_four():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_they_use_the_door_for_plugins_alone(example):
    (package,) = tomllib.loads((example / "pyproject.toml").read_text())["project"]["entry-points"]["quire"].values()
    for file in (example / package).glob("*.py"):
        strangers = {m for m in imports(file) if m not in DOORS and m.split(".")[0] not in OTHERS | {package}}
        assert strangers == set(), file
    for file in (example / "tests").glob("*.py"):
        ours = {module for module in imports(file) if module.split(".")[0] == "quire"}
        assert all(module == "quire.plugin" or module.startswith("quire.testing") for module in ours), file


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_each_is_under_120_lines(example):
    assert sum(len(file.read_text().splitlines()) for file in example.glob("quire_*/*.py")) < 120


def test_all_of_them_serve_a_request_as_their_readmes_configure_them(written, monkeypatch, tmp_path, caplog):
    monkeypatch.syspath_prepend(str(written / "site"))
    monkeypatch.chdir(tmp_path)
    names, options = {}, {}
    for example in EXAMPLES:
        given = yaml.safe_load((example / "README.md").read_text().split("```yaml\n")[1].split("```")[0])["plugins"]
        options |= given.pop("options")
        names |= given
    names["attention_backend"] = names.pop("attention")
    llm = LLM(**names, plugin_options=options)
    (output,) = llm.generate("2+2=", SamplingParams(max_tokens=4, seed=1), use_tqdm=False)
    assert output.outputs[0].token_ids
    assert "leaves out keys on purpose" in caplog.text
    llm.shutdown()
    (line,) = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert json.loads(line)["finish_reason"] == output.outputs[0].finish_reason


@pytest.mark.parametrize(("options", "words"), [({"window": 8}, True), ({}, False)])
def test_only_what_is_not_exact_is_warned_of(options, words, written, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(written / "site"))
    LLM(attention_backend="streaming", plugin_options={"streaming": options}).shutdown()
    assert ("leaves out keys on purpose" in caplog.text) is words
