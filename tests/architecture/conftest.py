"""Parsed sources of the repository, for tests that hold its rules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def sources():
    """`sources(folder, ...)` -> [(path from the root, text, tree)] of the Python files below these folders."""
    parsed = {}

    def read(path):
        if path not in parsed:
            text = path.read_text(encoding="utf-8")
            parsed[path] = (path.relative_to(ROOT).as_posix(), text, ast.parse(text))
        return parsed[path]

    def find(*folders):
        return [read(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]

    return find
