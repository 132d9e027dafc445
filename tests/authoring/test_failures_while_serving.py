"""Plugins that break their contract while they serve: the answer names the culprit, and what ships stays in use."""

from __future__ import annotations

import sys

import pytest

PLUGIN = """
from quire.plugin import OutputParser, Provider, Sampler, SchedulerPolicy, hookimpl


@hookimpl
def quire_providers():
    here = __name__
    yield Provider("sampler", "a_none", f"{here}:ReturnsNone", 1)
    yield Provider("sampler", "a_wide", f"{here}:ReturnsRows", 1)
    yield Provider("scheduler_policy", "a_raising", f"{here}:Raises", 1)
    yield Provider("output_parser", "a_parser", f"{here}:Parser", 1, priority=-20)


class ReturnsNone(Sampler):
    def sample(self, logits, batch):
        return None


class ReturnsRows(Sampler):
    def sample(self, logits, batch):
        return logits.argmax(-1, keepdim=True)


class Raises(SchedulerPolicy):
    def key(self, request, now):
        raise ValueError("no order")


class Parser(OutputParser):
    def feed(self, text, token_ids):
        raise ValueError("no words")

    def finish(self):
        return []
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "faulty.py"
    file.write_text(PLUGIN)
    yield file
    sys.modules.pop("faulty", None)


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--sampler", "a_none", "ReturnsNone.sample returned NoneType; token ids [R] are needed"),
        ("--sampler", "a_wide", "ReturnsRows.sample returned [1, 1]; token ids [R] are needed"),
        ("--scheduler-policy", "a_raising", "scheduling failed in plugin 'faulty' ("),
        ("--output-parser", "a_parser", "the output parser faulty:Parser failed: ValueError: no words"),
    ],
)
def test_the_culprit_is_named(option, name, words, file, quire):
    code, _, told = quire("--plugin", file, "run", option, name, "--temperature", "0", "What is 27+45?")
    assert code == 1
    assert words in told
    assert "this should not happen" not in told


def test_what_is_installed_beside_quire_displaces_nothing_of_it(file, quire):
    """All of these stand before Quire's own by their names, and none by its priority."""
    code, shown, told = quire("--plugin", file, "run", "--temperature", "0", "What is 27+45?")
    assert (code, shown) == (0, "72\n"), told
