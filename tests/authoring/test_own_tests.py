"""The tests that new plugins and the examples bring along pass where these are installed."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from quire.scaffold import points

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "plugins").glob("quire-*"))
LONG = "test_any_shape or test_long_context"
"""Left out here, run by the slow test below and by scripts/check_examples.sh."""


def test_they_pass(written, run):
    """All in one process, as a loaded interpreter is most of the cost."""
    files = [written / point / "tests" / "test_plugin.py" for point in points()]
    files += [file for example in EXAMPLES for file in (example / "tests").glob("test_*.py")]
    assert len(files) == 12
    options = (
        "-q",
        "-x",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir=.",
        "-k",
        f"not ({LONG})",
    )
    shown = run("-m", "pytest", *options, *files, cwd=written, site=written / "site")
    assert int(re.search(r"(\d+) passed", shown)[1]) > 300


def test_a_new_plugins_test_is_three_lines(written):
    for point in points():
        lines = (written / point / "tests" / "test_plugin.py").read_text().splitlines()
        assert len([line for line in lines if line and "import" not in line and "class Test" not in line]) <= 4


@pytest.mark.slow
def test_new_plugins_in_a_fresh_environment(written, tmp_path, run):
    """As their README says: pip, pytest, `quire plugins`. Only Quire and its dependencies are borrowed."""
    run("-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    borrowed = sysconfig.get_path("purelib")
    (own / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")

    def do(*arguments, cwd=written):
        answer = subprocess.run([python, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, (answer.stdout + answer.stderr)[-3000:]
        return answer.stdout

    folders = [written / point for point in points()]
    do("-m", "pip", "install", "-q", *(f"{folder}[test]" for folder in folders))
    assert sys.prefix not in do("-c", "import quire_my_attention; print(quire_my_attention.__file__)", cwd=tmp_path)
    for folder in folders:
        do("-P", "-m", "pytest", "-q", "--import-mode=importlib", "tests", cwd=folder)
    listed = do("-m", "quire.cli", "--strict-plugins", "plugins", "list", cwd=tmp_path)
    assert all(f"my-{point}" in listed for point in points())
