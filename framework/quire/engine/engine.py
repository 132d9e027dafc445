"""The engine: one model, one scheduler, one loop body. It owns no thread; `step` is called by a front end.

    add -> Scheduler.add ... step -> Scheduler.schedule -> Executor.step -> Scheduler.update -> deltas

With asynchronous scheduling a call launches a step, and then waits for the one before it, so that the host
schedules and makes texts while the device computes:

    step N+1:  schedule N+1 | launch N+1 | wait for N | update N | deltas of N
    device:    ... N ................... | N+1 .......................

Every accepted request ends in exactly one delta with `finished` set.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from quire.contract.executor import Executor
from quire.contract.kv import KVAllocator, KVStats
from quire.contract.metrics import MetricsSink, StepStats
from quire.contract.request import FinishReason, Request, RowResult, Schedule, StepResult
from quire.contract.scheduling import Scheduler, SchedulerStats
from quire.engine.chat import ChatFormat
from quire.engine.emission import Emission
from quire.engine.intake import Intake, Prompt, Submission
from quire.engine.metrics import Metrics, StepTimes, step_stats
from quire.engine.view import engine_view
from quire.errors import EngineDead, PluginError, RequestError
from quire.facade import EngineFacade, EngineView
from quire.outputs import OutputDelta
from quire.params import SamplingParams
from quire.resolve import ResolvedConfig
from quire.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine gives up; each ends the requests that were in it."""

NUM_STEPS = 240
"""Steps that the engine remembers for those who look at it."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine works with; `quire.engine.build` makes them from a configuration."""

    config: ResolvedConfig
    executor: Executor
    allocator: KVAllocator
    scheduler: Scheduler
    tokenizer: Tokenizer
    intake: Intake
    metrics: Metrics
    chat: ChatFormat
    on_step: Callable[[StepStats], None] | None
    num_kv_blocks: int
    blame: Callable[[BaseException], str]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was handed to the executor. `schedule_s`: seconds that scheduling it took."""

    schedule: Schedule
    future: Future[StepResult]
    schedule_s: float


class Engine:
    """Runs requests to their end. `prepare` is safe from any thread, everything else belongs to one."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self._emission = Emission(parts.tokenizer, self._finish)
        self._flying: deque[_Flight] = deque()
        self._depth = 2 if parts.config.async_scheduling else 1
        self._failed_steps = 0
        self._steps: deque[StepStats] = deque(maxlen=NUM_STEPS)

    @property
    def last_step(self) -> StepStats | None:
        """The last step that ran anything; None before the first."""
        return self._steps[-1] if self._steps else None

    @property
    def config(self) -> ResolvedConfig:
        """What runs."""
        return self.parts.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.parts.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """Renders conversations, and parses answers."""
        return self.parts.chat

    def attach(self, post: Callable[[Callable[[], None]], None]) -> None:
        """Nothing to do: all that happens here happens in `step`."""

    def add_sink(self, name: str, sink: MetricsSink) -> None:
        """Feed one more metrics sink from now on."""
        self.parts.metrics.add(name, sink)

    def health(self) -> str | None:
        """None if the executor can serve, else the reason why not."""
        return self.parts.executor.health()

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Submission:
        """Tokenize and check a request. Raises RequestError."""
        return self.parts.intake.prepare(request_id, prompt, params, priority=priority, cache_salt=cache_salt)

    def add(self, submission: Submission) -> None:
        """Accept a prepared request. Raises RequestError if it can never run or its id is taken."""
        if self._emission.sequence_ids(submission.request_id):
            raise RequestError(f"request id {submission.request_id!r} is in use", param="request_id")
        added: list[Request] = []
        try:
            for request in submission.sequences:
                self.parts.scheduler.add(request)
                added.append(request)
        except RequestError:
            for request in added:
                self.parts.scheduler.finish(request.request_id, FinishReason.ABORT)
            raise
        self._emission.begin(submission)

    def abort(self, request_id: str) -> list[OutputDelta]:
        """End a request; its final deltas. Unknown or ended requests are a no-op."""
        return self._end(request_id, FinishReason.ABORT, None)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._flying) or self.parts.scheduler.has_work()

    def step(self) -> list[OutputDelta]:
        """Launch one step, and end the one that is due; what that added. Raises EngineDead if several fail in a row."""
        started = time.perf_counter()
        schedule = self._scheduled()
        scheduled = time.perf_counter()
        self.parts.metrics.scheduled(schedule)
        future = self._launch(schedule)
        if schedule.is_empty:
            return self._land() if self._flying else []
        self._flying.append(_Flight(schedule, future, scheduled - started))
        deltas: list[OutputDelta] = []
        # A step that is done although nobody has waited has failed, most likely; nothing is built on it then.
        while self._flying and (len(self._flying) >= self._depth or future.done()):
            deltas += self._land()
        return deltas

    def fail(self, error: str) -> list[OutputDelta]:
        """End every live request with an error; their final deltas."""
        return [
            delta
            for request_id in self._emission.live_ids()
            for delta in self._end(request_id, FinishReason.ERROR, error)
        ]

    def info(self) -> EngineFacade:
        """What serves, and how much it can hold."""
        return engine_info(self.parts.config, self.parts.num_kv_blocks)

    def kv_stats(self) -> KVStats:
        """The KV pool's snapshot."""
        return self.parts.allocator.stats()

    def scheduler_stats(self) -> SchedulerStats:
        """The queues' snapshot."""
        return self.parts.scheduler.stats()

    def view(self) -> EngineView:
        """Who holds which blocks, and how much there is to do. Costs nothing until it is called."""
        return engine_view(self.parts.allocator, self.parts.scheduler, self._emission.live_requests(), self._steps)

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Raises RuntimeError while requests run."""
        self.parts.allocator.reset()

    def shutdown(self) -> None:
        """Let model, caches and sinks go; idempotent."""
        self._flying.clear()
        self.parts.metrics.close()
        self.parts.executor.shutdown()

    def _launch(self, schedule: Schedule) -> Future[StepResult]:
        try:
            return self.parts.executor.step(schedule)
        except Exception as error:
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed

    def _land(self) -> list[OutputDelta]:
        """Wait for the oldest step in flight, and take its results."""
        parts, flight = self.parts, self._flying.popleft()
        result = self._result(flight)
        landed = time.perf_counter()
        updates = parts.scheduler.update(flight.schedule, result)
        gaps = parts.metrics.token_gaps(updates)  # before anything forgets a sequence that has ended
        deltas = self._emission.process(updates)
        times = StepTimes(flight.schedule_s, time.perf_counter() - landed, gaps)
        self._report(step_stats(flight.schedule, result, updates, times, parts.scheduler, parts.allocator))
        parts.metrics.updated(updates)
        return deltas

    def _result(self, flight: _Flight) -> StepResult:
        schedule = flight.schedule
        try:
            result = flight.future.result()
        except Exception as error:
            self._failed_steps += 1
            where, ending = self.parts.blame(error), len(schedule.rows)
            logger.exception("step %d failed%s; its %d requests end", schedule.step_id, where, ending)
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise EngineDead(
                    f"{self._failed_steps} steps in a row failed, the last{where} with: {error}"
                ) from error
            text = f"the step failed{where}: {type(error).__name__}: {error}"
            rows = tuple(RowResult(row.request_id, error=text) for row in schedule.rows)
            return StepResult(schedule.step_id, rows)
        self._failed_steps = 0
        return result

    def _scheduled(self) -> Schedule:
        """The next schedule. Raises PluginError if a plugin's policy, scheduler or allocator fails."""
        try:
            return self.parts.scheduler.schedule()
        except Exception as error:
            if where := self.parts.blame(error):
                raise PluginError(f"scheduling failed{where}: {type(error).__name__}: {error}") from error
            raise

    def _report(self, stats: StepStats) -> None:
        self._steps.append(stats)
        self.parts.metrics.step(stats)
        if self.parts.on_step is not None:
            self.parts.on_step(stats)

    def _finish(self, sequence_id: str, reason: FinishReason) -> None:
        request = self.parts.scheduler.finish(sequence_id, reason)
        if request is not None:
            self.parts.metrics.finished(request)

    def _end(self, request_id: str, reason: FinishReason, error: str | None) -> list[OutputDelta]:
        deltas = []
        for key in self._emission.sequence_ids(request_id):
            self._finish(key, reason)
            delta = self._emission.end(key, reason, error)
            if delta is not None:
                deltas.append(delta)
        return deltas


def engine_info(config: ResolvedConfig, num_kv_blocks: int) -> EngineFacade:
    """What serves with a configuration, and how much it can hold."""
    return EngineFacade(
        model=config.checkpoint.name,
        max_model_len=config.max_model_len,
        num_kv_blocks=num_kv_blocks,
        block_size=config.block_size,
        selected={point: choice.provider.name for point, choice in config.selected.items()},
    )
