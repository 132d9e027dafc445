"""The tests that new plugins and the examples bring along pass where these are installed."""

from __future__ import annotations

import re
from pathlib import Path

from quire.scaffold import points

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "plugins").glob("quire-*"))


def test_they_pass(written, run):
    """All in one process, as a loaded interpreter is most of the cost."""
    files = [written / point / "tests" / "test_plugin.py" for point in points()]
    files += [file for example in EXAMPLES for file in (example / "tests").glob("test_*.py")]
    assert len(files) == 12
    options = ("-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.")
    shown = run("-m", "pytest", *options, *files, cwd=written, site=written / "site")
    assert int(re.search(r"(\d+) passed", shown)[1]) > 300


def test_a_new_plugins_test_is_three_lines(written):
    for point in points():
        lines = (written / point / "tests" / "test_plugin.py").read_text().splitlines()
        assert len([line for line in lines if line and "import" not in line and "class Test" not in line]) <= 4
