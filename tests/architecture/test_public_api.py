"""Every public signature and field, written down: a change must be meant, and reviewed as what it is."""

from __future__ import annotations

import importlib

import pytest
from public_api import MODULES, SNAPSHOT, describe, describe_all, difference


def test_the_public_api_is_as_written_down():
    if changes := difference(SNAPSHOT.read_text(encoding="utf-8"), describe_all()):
        pytest.fail(changes, pytrace=False)
    assert SNAPSHOT.read_text(encoding="utf-8") == describe_all()


WRITTEN = SNAPSHOT.read_text(encoding="utf-8")
KEY = "    abstract def key(self, request: RequestView, now: float) -> tuple[float, ...]\n"


@pytest.mark.parametrize(
    ("old", "new", "words", "breaks"),
    [
        (KEY, KEY.replace("now", "view"), ["quire.plugin: SchedulerPolicy changed:", "- ", "view: float"], True),
        (KEY, "", ["quire.plugin: SchedulerPolicy changed:", "  -     abstract def key"], True),
        (KEY, KEY + "    abstract def rank(self) -> int\n", ["+     abstract def rank(self) -> int"], True),
        (KEY, KEY + "    def rank(self) -> int\n", ["+     def rank(self) -> int"], False),
        ("    max_tokens: int\n", "    max_tokens: int\n    tier: str\n", ["+     tier: str"], True),
        ("    max_tokens: int\n", "    max_tokens: int\n    tier: str = 'a'\n", ["+     tier: str = 'a'"], False),
        ("class SchedulerPolicy(", "class Policy(", ["Policy is new", "SchedulerPolicy is gone"], True),
    ],
)
def test_the_difference_says_what_changed_and_what_to_do(old, new, words, breaks):
    assert old in WRITTEN
    said = difference(WRITTEN, WRITTEN.replace(old, new))
    for word in [*words, "scripts/public_api.py --update", "CHANGELOG.md"]:
        assert word in said
    assert ("raise `current`" in said) == breaks
    assert len(said.splitlines()) < 30
    assert difference(WRITTEN, WRITTEN) == ""


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
