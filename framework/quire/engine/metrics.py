"""Collects what a step did and hands it to the metrics sinks; a sink that keeps failing is muted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quire.contract.kv import KVAllocator
from quire.contract.metrics import MetricsInit, MetricsSink, RequestStats, StepStats
from quire.contract.request import Request, Schedule, StepResult
from quire.contract.scheduling import RequestUpdate, Scheduler

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""How often a sink may raise before it is muted."""

LOG_INTERVAL = 10.0
"""Seconds between two lines of `LogSink`."""


@dataclass(slots=True)
class _Muted:
    sink: MetricsSink
    name: str
    failures: int = 0


class Metrics:
    """Fans statistics out to sinks. Times of requests are kept until they end."""

    def __init__(self, sinks: Sequence[tuple[str, MetricsSink]], clock: Callable[[], float]) -> None:
        self._sinks = [_Muted(sink, name) for name, sink in sinks]
        self._clock = clock
        self._started: dict[str, float] = {}
        self._first_token: dict[str, float] = {}
        self._last_token: dict[str, float] = {}

    def add(self, name: str, sink: MetricsSink) -> None:
        """Feed one more sink from now on."""
        self._sinks.append(_Muted(sink, name))

    def step(self, stats: StepStats) -> None:
        """A step has ended."""
        for entry in self._sinks:
            self._guard(entry, lambda sink: sink.record_step(stats))

    def scheduled(self, schedule: Schedule) -> None:
        """Remember when each request first ran."""
        if schedule.new_rows:
            now = self._clock()
            for row in schedule.new_rows:
                self._started.setdefault(row.request_id, now)

    def token_gaps(self, updates: Sequence[RequestUpdate]) -> tuple[tuple[float, int], ...]:
        """How long ago the sequences that got tokens had got some before, as in `StepStats.token_gaps`."""
        now = self._clock()
        gaps: dict[float, int] = {}
        for update in updates:
            if not update.new_token_ids:
                continue
            key = update.request.request_id
            if (last := self._last_token.get(key)) is not None:
                gaps[now - last] = gaps.get(now - last, 0) + 1
            self._last_token[key] = now
        return tuple(gaps.items())

    def updated(self, updates: Sequence[RequestUpdate]) -> None:
        """Remember first tokens, and report the requests that ended."""
        now = self._clock()
        for update in updates:
            request = update.request
            if update.new_token_ids and request.num_output_tokens == len(update.new_token_ids):
                self._first_token.setdefault(request.request_id, now)
            if request.is_finished:
                self.finished(request)

    def finished(self, request: Request) -> None:
        """A request has ended, by whatever reason."""
        now, arrived, key = self._clock(), request.arrival_time, request.request_id
        started, first = self._started.pop(key, None), self._first_token.pop(key, None)
        self._last_token.pop(key, None)
        stats = RequestStats(
            request_id=key,
            finish_reason=request.finish_reason.value if request.finish_reason else "",
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=max(0, request.num_cached_tokens),
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            queue_s=None if started is None else started - arrived,
            first_token_s=None if first is None else first - arrived,
            total_s=now - arrived,
        )
        self.request(stats)

    def request(self, stats: RequestStats) -> None:
        """A request has ended, with these statistics."""
        for entry in self._sinks:
            self._guard(entry, lambda sink: sink.record_request(stats))

    def close(self) -> None:
        """Let every sink flush."""
        for entry in self._sinks:
            self._guard(entry, lambda sink: sink.close())

    def _guard(self, entry: _Muted, call: Callable[[MetricsSink], None]) -> None:
        if entry.failures >= MAX_FAILURES:
            return
        try:
            call(entry.sink)
        except Exception:
            entry.failures += 1
            muted = "; it is muted from now on" if entry.failures == MAX_FAILURES else ""
            logger.warning("metrics sink %r failed%s", entry.name, muted, exc_info=True)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that the engine itself spent on a step, and the gaps that sequences waited for it."""

    schedule_s: float
    update_s: float
    token_gaps: tuple[tuple[float, int], ...]


def step_stats(
    schedule: Schedule,
    result: StepResult,
    updates: Sequence[RequestUpdate],
    times: StepTimes,
    scheduler: Scheduler,
    allocator: KVAllocator,
) -> StepStats:
    """One step's statistics, from its parts."""
    queue, pool = scheduler.stats(), allocator.stats()
    return StepStats(
        step_id=schedule.step_id,
        time=time.time(),
        num_waiting=queue.num_waiting,
        num_running=queue.num_running,
        num_rows=len(schedule.rows),
        num_tokens=schedule.num_tokens,
        num_sampled=sum(len(update.new_token_ids) for update in updates),
        kv_used_blocks=pool.used,
        kv_total_blocks=pool.total,
        prefix_query_tokens=pool.query_tokens,
        prefix_hit_tokens=pool.hit_tokens,
        num_preemptions=queue.num_preemptions,
        num_finished=sum(update.request.is_finished for update in updates),
        schedule_s=times.schedule_s,
        build_s=result.build_s,
        forward_s=result.forward_s,
        sample_s=result.sample_s,
        update_s=times.update_s,
        token_gaps=times.token_gaps,
        wait_s=result.wait_s,
    )


class LogSink(MetricsSink):
    """Writes one line to the log every ten seconds of work: throughput, queue, KV use, prefix hits."""

    def __init__(self, init: MetricsInit) -> None:
        super().__init__(init)
        self._since = time.monotonic()
        self._computed = self._sampled = 0

    def record_step(self, stats: StepStats) -> None:
        self._computed += stats.num_tokens
        self._sampled += stats.num_sampled
        elapsed = time.monotonic() - self._since
        if elapsed < LOG_INTERVAL:
            return
        logger.info(
            "%s: %.1f tokens/s computed, %.1f sampled; %d running, %d waiting; KV %.1f %%, prefix hits %.1f %%",
            self.init.model,
            self._computed / elapsed,
            self._sampled / elapsed,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_used_blocks / max(1, stats.kv_total_blocks),
            100 * stats.prefix_hit_tokens / max(1, stats.prefix_query_tokens),
        )
        self._since, self._computed, self._sampled = time.monotonic(), 0, 0
