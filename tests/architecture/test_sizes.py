"""Functions stay short, and the table of sizes is printed from the code."""

from __future__ import annotations

import subprocess
import sys

from sizes import LONG_FILE, LONG_FUNCTION, ROOT, functions, num_lines, python_files

KERNELS = {"_attend": 120, "paged_attention_kernel": 135}
"""Triton compiles a kernel as one function, and names every argument on a line of its own."""


def test_no_function_is_longer_than_eighty_lines():
    code = python_files("framework", "plugins", "server", "scripts", "benchmarks", "examples")
    found = [item for path in code for item in functions(path) if item.lines > KERNELS.get(item.name, LONG_FUNCTION)]
    assert [f"{item.file.relative_to(ROOT)}:{item.name} has {item.lines}" for item in found] == []


def test_lengths_include_decorators(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text("@one\n@two\ndef f():\n    def g():\n        pass\n    return g\n")
    assert {(item.name, item.lines) for item in functions(file)} == {("f", 6), ("g", 2)}


def test_the_table_lists_long_files():
    table = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sizes.py"), "--long"], capture_output=True, text=True, check=True
    ).stdout
    assert "framework/quire/engine" in table
    for path in python_files("framework", "plugins", "server"):
        if num_lines(path) > LONG_FILE:
            assert str(path.relative_to(ROOT)) in table
