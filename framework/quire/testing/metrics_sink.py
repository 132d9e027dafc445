"""Conformance of metrics sinks: they take every plausible figure, quickly and without raising."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from quire.contract.metrics import MetricsInit, MetricsSink, RequestStats, StepStats

WAITS = frozenset(
    {
        *("sleep", "open", "fsync", "fdatasync", "fork_exec", "waitpid", "select", "poll", "getaddrinfo"),
        *("connect", "connect_ex", "accept", "sendall", "recv", "recv_into", "recvfrom"),
    }
)
"""Functions of the standard library, written in C, that wait for a clock, a disk or another machine."""


def step_stats(step_id: int, **changes: Any) -> StepStats:
    """Figures of one plausible step."""
    fields = {
        "time": 1.7e9 + step_id,
        "num_waiting": 1,
        "num_running": 3,
        "num_rows": 3,
        "num_tokens": 12,
        "num_sampled": 2,
        "kv_used_blocks": 5,
        "kv_total_blocks": 64,
        "prefix_query_tokens": 100,
        "prefix_hit_tokens": 40,
        "num_preemptions": 0,
        "num_finished": 1,
        "schedule_s": 1e-4,
        "build_s": 1e-4,
        "forward_s": 1e-2,
        "sample_s": 1e-3,
        "update_s": 1e-4,
    }
    return StepStats(step_id=step_id, **(fields | changes))


class MetricsSinkConformance:
    """What every sink must hold. Subclass, and give the fixture `sink_class`."""

    @pytest.fixture
    def sink_class(self) -> type[MetricsSink]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `sink_class`")

    def test_takes_any_figures(self, sink_class: type[MetricsSink]) -> None:
        """Empty pools and caches, totals that begin anew, requests that never ran: none of it raises.

        If it fails: guard every quotient, expect totals to fall to 0, and treat None as `never`.
        """
        sink = sink_class(MetricsInit("model"))
        sink.record_step(step_stats(0, kv_total_blocks=0, kv_used_blocks=0, prefix_query_tokens=0, prefix_hit_tokens=0))
        for step_id in range(1, 50):
            sink.record_step(step_stats(step_id, token_gaps=((0.01, 2), (1.5, 1))))
        sink.record_step(step_stats(0, prefix_query_tokens=3, prefix_hit_tokens=1))
        sink.record_request(RequestStats("a", "abort", 5, 0, 0, 0, None, None, 0.1))
        sink.record_request(RequestStats("b", "stop", 5, 4, 7, 2, 0.01, 0.02, 0.5))
        sink.close()

    def test_close_alone_is_fine(self, sink_class: type[MetricsSink]) -> None:
        """An engine may end before its first step.

        If it fails: open files and connections at the first figure, and close what was opened.
        """
        sink_class(MetricsInit("model")).close()

    def test_returns_at_once(self, sink_class: type[MetricsSink]) -> None:
        """The engine waits for a sink in every step: once it is under way, no call sleeps, opens, sends or receives.

        If it fails: put the figures on a queue and let a thread of your own write or send them.
        """
        sink = sink_class(MetricsInit("model"))
        sink.record_step(step_stats(0))
        waits = [waits_in(partial(sink.record_step, step_stats(step_id))) for step_id in range(1, 21)]
        sink.close()
        waiting = [names for names in waits if names]
        assert not waiting, f"{len(waiting)} of {len(waits)} calls wait, the first in {', '.join(waiting[0])}"


def waits_in(call: Callable[[], object]) -> list[str]:
    """Which functions that wait this thread runs into while it makes the call."""
    found: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in WAITS:
            found.append(function.__name__)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
