"""A checkout runs where nothing can be installed: plugins are found, and what is missing is named."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import uninstalled

ROOT = Path(__file__).parents[2]


def test_plugins_are_found_as_if_installed(tmp_path):
    answer = subprocess.run(
        [sys.executable, "scripts/uninstalled.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = answer.stdout.strip().split(os.pathsep)
    assert paths[0] == str(tmp_path)
    (found,) = importlib.metadata.distributions(path=paths[:1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = {point.name: point.value for point in found.entry_points.select(group="quire")}
    assert written == project["entry-points"]["quire"]
    assert (found.name, found.version) == ("quire", importlib.metadata.version("quire"))
    for module in (*written.values(), "quire"):
        assert any((Path(path) / module).is_dir() for path in paths[1:]), module


def test_what_is_missing_is_named_and_an_old_version_only_warned_of():
    absent, other = uninstalled.unmet(["pluggy>=1.0", "no-such-thing-as-this>=2", "pluggy>=999"])
    assert absent == ["no-such-thing-as-this>=2"]
    assert other == [f"pluggy>=999 (there is {importlib.metadata.version('pluggy')})"]
