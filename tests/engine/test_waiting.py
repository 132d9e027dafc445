"""Torch's idle threads are told to sleep, before torch is there to be told."""

import ast
import os
import runpy
import sys
from pathlib import Path

import quire
from quire import waiting


def settled(monkeypatch, before):
    """What importing the module makes of the variable."""
    (monkeypatch.delenv if before is None else monkeypatch.setenv)("OMP_WAIT_POLICY", *([before] if before else []))
    runpy.run_path(str(waiting.__file__))
    return os.environ.get("OMP_WAIT_POLICY")


def test_the_variable_is_set_unless_somebody_has_set_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert settled(monkeypatch, "active") == "active"
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    assert settled(monkeypatch, None) == "passive"


def test_where_torch_is_there_already_nothing_is_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    assert settled(monkeypatch, None) is None


def test_it_comes_before_everything_that_quire_imports():
    first = next(
        node
        for node in ast.parse(Path(quire.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    assert ast.unparse(first) == "import quire.waiting"
