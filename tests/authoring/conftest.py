"""Plugins' repositories, installed without pip: a copy of the package, and the metadata that pip would write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from quire.cli.app import app
from quire.scaffold import new_plugin, points
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "plugins").glob("quire-*"))


def install(repository, site):
    """Put the repository's package, and the entry points of its pyproject.toml, into the folder `site`."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for package in repository.glob("quire_*"):
        shutil.copytree(package, site / package.name)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def run_python(*arguments, cwd, site=None, code=0):
    """Run Python with `site` on its path; its output, standard error behind standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(site)} if site else {})
    answer = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    output = answer.stdout + answer.stderr
    assert answer.returncode == code, output[-4000:]
    return output


@pytest.fixture
def run():
    return run_python


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A folder with a new repository per point, and `site`, where these and the examples are installed."""
    root = tmp_path_factory.mktemp("written")
    for point in points():
        new_plugin(point, f"my-{point}", root / point, license="MIT", holder="Ada Example", year=2026)
        install(root / point, root / "site")
    for example in EXAMPLES:
        install(example, root / "site")
    return root


@pytest.fixture
def installer():
    return install


@pytest.fixture
def quire():
    """Runs the program in this process; (exit code, stdout, stderr)."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="quire")
        return result.exit_code, result.stdout, result.stderr

    return call
