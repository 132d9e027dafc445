"""The README's table of scores names every provider of our own that can be certified here, as what it is."""

import pytest
from quire.registry import build_host
from quire.testing.certify import Score, why_not
from scores import HEAD, README, certify, rows, runnable, table, with_table


@pytest.fixture(scope="module")
def host():
    return build_host()


def test_the_readme_names_every_provider_and_none_that_is_gone(host):
    there = {(provider.point, provider.name) for provider, _ in runnable(host)}
    said = rows(README.read_text(encoding="utf-8"))
    assert {(point, name) for point, name, _ in said} == there, "run python scripts/scores.py --update"
    assert {verdict for *_, verdict in said} == {"certified"}
    assert [why_not(host, provider) for provider, _ in runnable(host)] == [""] * len(there)


def test_the_table_is_written_and_read_alike():
    scores = [Score("op", "a", "x", "certified", 3), Score("op", "b", "x", "certified", 3)]
    scores.append(Score("op", "c", "x", "failed", 3, 1))
    text = with_table(f"before\n\n{HEAD}| old | `gone` | certified | 1 |\n\nafter\n", table(scores))
    assert "| op | `a`, `b` | certified | 3 each |\n| op | `c` | failed | 3 |\n\nafter" in text
    assert text.startswith("before\n\n")
    assert rows(text) == {("op", "a", "certified"), ("op", "b", "certified"), ("op", "c", "failed")}


def test_scores_are_counted_by_provider(host):
    chosen = [pair for pair in runnable(host) if pair[0].point in ("scheduler_policy", "metrics_sink")]
    scores = certify(chosen)
    assert {(score.name, score.verdict) for score in scores} == {
        (name, "certified") for name in ("fcfs", "priority", "log")
    }
    assert all(score.passed >= 3 for score in scores)


@pytest.mark.slow
def test_every_verdict_of_the_readme_is_what_the_kit_says(host):
    scores = certify(runnable(host))
    said = rows(README.read_text(encoding="utf-8"))
    assert {(score.point, score.name, score.verdict) for score in scores} == said
