"""Metrics sinks: observers of steps and of finished requests. One that fails three times is muted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step. Times are seconds; counts are of this step unless they say total.

    Attributes:
        step_id: the schedule's.
        time: wall-clock time at the step's end, seconds since the epoch.
        num_waiting: queued requests after the step. num_running: running ones.
        num_rows: rows of the step. num_tokens: tokens computed. num_sampled: tokens sampled.
        kv_used_blocks: blocks owned. kv_total_blocks: blocks in the pool.
        prefix_query_tokens: total tokens looked up in the prefix cache. prefix_hit_tokens: total found.
        num_preemptions: total. num_finished: requests that ended in this step.
        schedule_s, build_s, forward_s, sample_s, update_s: where the host's time went.
        token_gaps: (seconds since the step that gave a sequence its tokens before, number of such sequences).
        wait_s: how long the host waited for the device.

    Totals count from 0 again when the engine's process has been replaced.
    """

    step_id: int
    time: float
    num_waiting: int
    num_running: int
    num_rows: int
    num_tokens: int
    num_sampled: int
    kv_used_blocks: int
    kv_total_blocks: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    num_preemptions: int
    num_finished: int
    schedule_s: float
    build_s: float
    forward_s: float
    sample_s: float
    update_s: float
    token_gaps: tuple[tuple[float, int], ...] = ()
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request that ended. Times are seconds from its arrival; None if it never got there."""

    request_id: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    queue_s: float | None
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class MetricsInit:
    """All that a sink is constructed from.

    Attributes:
        model: name of the model that is served.
        options: the validated instance of `Provider.options`, or None.
    """

    model: str
    options: Any = None


class MetricsSink(ABC):
    """Receives statistics in the engine's thread: return at once, hand slow work to a thread of your own."""

    def __init__(self, init: MetricsInit) -> None:
        self.init = init

    @abstractmethod
    def record_step(self, stats: StepStats) -> None:
        """A step has ended."""

    def record_request(self, stats: RequestStats) -> None:
        """A request has ended."""

    def close(self) -> None:
        """The engine shuts down; flush."""
