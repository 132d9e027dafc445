"""The tutorial's code, stage by stage, does what the page says of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quire.cli.app import app
from quire.scaffold import new_plugin
from quire.testing.attention import AttentionConformance
from quire.testing.attention_problems import CASES
from typer.testing import CliRunner

PAGE = (Path(__file__).parents[2] / "docs" / "plugins" / "tutorial.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```\w+\n# (quire_mine/\S+\.py|quire\.yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INIT, CODE = "quire_mine/__init__.py", "quire_mine/attention.py"


def files_of(section):
    """The files that the section with this number has the reader write."""
    (text,) = re.findall(rf"^## {section}\. .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return dict(FILE.findall(text))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What `quire plugins new attention mine` writes, installed as `pip install -e` does, and the current folder."""
    new_plugin("attention", "mine", tmp_path / "quire-mine", license="MIT", holder="me", year=2026)
    info = tmp_path / "quire-mine" / "quire_mine-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quire-mine\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[quire]\nmine = quire_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path / "quire-mine"))
    monkeypatch.chdir(tmp_path / "quire-mine")
    yield tmp_path / "quire-mine"
    forget()


def forget():
    for name in [name for name in sys.modules if name.startswith("quire_mine")]:
        del sys.modules[name]


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    forget()


def declare_window(folder):
    (caps,) = re.findall(r"# caps of quire_mine/attention.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    text = (folder / CODE).read_text()
    changed = re.sub(r"    caps = AttentionCaps\(.*?\n    \)\n", caps, text, flags=re.DOTALL)
    assert changed != text
    write(folder, {CODE: changed})


def outcomes(layer):
    """Case -> passed, failed or skipped, of the kit's comparison with the oracle."""
    from quire_mine.attention import MineAttention

    found = {}
    for case in CASES:
        try:
            AttentionConformance().test_equals_the_oracle(MineAttention, layer, case)
            found[case] = "passed"
        except AssertionError:
            found[case] = "failed"
        except pytest.skip.Exception:
            found[case] = "skipped"
    return set(found.values()), found


def answer(*arguments):
    result = CliRunner().invoke(app, [*arguments, "What is 27+45?"], prog_name="quire")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_least_backend_is_right(folder):
    write(folder, files_of(2))
    assert outcomes("gqa")[0] == {"passed"}
    assert outcomes("window")[0] == {"skipped"}
    assert answer("run", "--attention-backend", "mine", "--temperature", "0") == "72\n"


def test_the_false_claim_is_found_out(folder):
    write(folder, files_of(2))
    declare_window(folder)
    assert outcomes("gqa")[0] == {"passed"}
    assert outcomes("window")[1]["decode"] == "failed"
    assert "sliding_window - 1" in AttentionConformance.test_equals_the_oracle.__doc__


def test_the_last_one_is_right_and_selected_by_the_file(folder):
    write(folder, files_of(4) | files_of(5))
    for layer in ("gqa", "window", "other v size"):
        assert outcomes(layer)[0] == {"passed"}
    assert answer("-c", "quire.yaml", "run") == "72\n"
    change = (folder / "quire.yaml").read_text().replace("query_rows", "query_row")
    (folder / "quire.yaml").write_text(change)
    result = CliRunner().invoke(app, ["-c", "quire.yaml", "run", "What is 27+45?"], prog_name="quire")
    assert "did you mean 'query_rows'?" in result.stderr


def test_the_page_shows_what_is_written(folder):
    (listing,) = re.findall(r"^quire-mine/\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"(\S+\.\w+|LICENSE|\.gitignore)(?=,|\s|$)", listing):
        if "/" in name or name in ("pyproject.toml", "quire.yaml", "README.md", "LICENSE", ".gitignore"):
            assert (folder / name).is_file(), name


@pytest.mark.slow
def test_the_verdicts_are_as_the_page_says(folder):
    def verdict(code):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "quire.cli", "plugins", "test", "mine", "--json"]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert shown.returncode == code, shown.stderr
        return json.loads(shown.stdout)[0]

    assert verdict(0)["verdict"] == "certified"
    write(folder, files_of(2))
    assert verdict(0)["verdict"] == "certified"
    declare_window(folder)
    failed = verdict(1)
    assert failed["verdict"] == "failed"
    assert "test_equals_the_oracle[window-decode]" in {failure["check"] for failure in failed["failures"]}
    write(folder, files_of(4))
    assert verdict(0)["verdict"] == "certified"
