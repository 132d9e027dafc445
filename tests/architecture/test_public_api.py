"""Every public signature and field, written down: a change must be meant, and reviewed as what it is."""

from __future__ import annotations

import difflib
import importlib

import pytest
from public_api import MODULES, SNAPSHOT, describe, describe_all


def test_the_public_api_is_as_written_down():
    written, now = SNAPSHOT.read_text(encoding="utf-8"), describe_all()
    changes = "\n".join(
        difflib.unified_diff(written.splitlines(), now.splitlines(), "written down", "now", lineterm="")
    )
    assert written == now, f"if this is meant, run python scripts/public_api.py --update\n{changes}"


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete_and_in_order(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [item for item in module.__all__ if not hasattr(module, item)]
    assert missing == []


def test_a_change_of_a_signature_shows():
    class One:
        def step(self, count: int = 1) -> str: ...

    class Two:
        def step(self, count: int = 2) -> str: ...

    assert list(describe("Thing", One)) != list(describe("Thing", Two))
    assert "count: int = 1" in list(describe("Thing", One))[1]
