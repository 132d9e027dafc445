"""Runs a scheduler without a model: a virtual clock, and an executor that knows what every KV slot holds.

The fake model's next token is a function of all tokens before it, so a wrong block, a lost token or
a forgotten recompute changes the output, and is found also where the row's own check did not see it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.contract.request import FinishReason, Request, RowResult, Schedule, ScheduledRow, StepResult
from quire.contract.scheduling import RequestUpdate, Scheduler, SchedulerInit
from quire.params import SamplingParams
from quire.testing.clock import VirtualClock

VOCAB = 50
STOP = 0
STEP_SECONDS = 0.05


def next_token(tokens: Sequence[int], seed: int) -> int:
    """The fake model: deterministic, and sensitive to every token before."""
    digest = hashlib.blake2b(bytes(token % 256 for token in tokens), digest_size=4, salt=seed.to_bytes(8)).digest()
    return int.from_bytes(digest) % VOCAB


def expected_output(request: Request) -> tuple[list[int], FinishReason]:
    """What the request must produce if nothing interferes."""
    tokens, output = list(request.prompt_token_ids), list[int]()
    while True:
        token = next_token(tokens, request.seed)
        tokens.append(token)
        output.append(token)
        if token in request.stop_token_ids and len(output) >= request.params.min_tokens:
            return output, FinishReason.STOP
        if len(output) >= request.max_tokens:
            return output, FinishReason.LENGTH


@dataclass
class _Row:
    tokens: list[int]
    seed: int
    blocks: list[int] = field(default_factory=list)


class FakeExecutor:
    """Runs schedules on a KV pool whose slots hold the tokens they stand for."""

    def __init__(self, init: SchedulerInit) -> None:
        self._init = init
        self._size = init.allocator.init.block_size
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, tuple[int, ...]] = {}

    def run(self, schedule: Schedule) -> StepResult:
        """Check one schedule and answer it."""
        assert schedule.num_tokens == sum(row.num_new_tokens for row in schedule.rows)
        assert schedule.num_tokens <= self._init.max_num_batched_tokens, "the token budget was exceeded"
        lengths = [row.num_new_tokens > 1 for row in schedule.rows]
        assert lengths == sorted(lengths), "decodes must stand first"
        for slot in schedule.released:
            del self._rows[slot]
        for new in schedule.new_rows:
            assert 0 <= new.slot < self._init.max_num_seqs
            assert new.slot not in self._rows, "a slot was given away twice"
            self._rows[new.slot] = _Row(list(new.token_ids), new.seed)
        for copy in schedule.copies:
            for offset in range(copy.num_tokens):
                source = self._slots.get(copy.src * self._size + offset)
                assert source is not None, "a copy reads a slot that was never written"
                self._slots[copy.dst * self._size + offset] = source
        assert len({row.slot for row in schedule.rows}) == len(schedule.rows), "a slot stands in two rows"
        return StepResult(schedule.step_id, tuple(self._row(row) for row in schedule.rows))

    def _row(self, scheduled: ScheduledRow) -> RowResult:
        row = self._rows[scheduled.slot]
        row.blocks.extend(scheduled.new_block_ids)
        end = scheduled.num_computed_tokens + scheduled.num_new_tokens
        assert scheduled.num_new_tokens >= 1
        assert end <= len(row.tokens), "tokens that nobody knows were scheduled"
        assert end <= len(row.blocks) * self._size, "tokens without a block were scheduled"
        for position in range(end):
            slot = row.blocks[position // self._size] * self._size + position % self._size
            content = tuple(row.tokens[: position + 1])
            if position >= scheduled.num_computed_tokens:
                self._slots[slot] = content
            assert self._slots.get(slot) == content, f"{scheduled.request_id} reads a wrong KV at {position}"
        assert scheduled.samples == (end == len(row.tokens))
        if not scheduled.samples:
            return RowResult(scheduled.request_id)
        token = next_token(row.tokens, row.seed)
        row.tokens.append(token)
        return RowResult(scheduled.request_id, token)


class Simulation:
    """Feeds arrivals and aborts to a scheduler until everything has ended.

    Args:
        scheduler: the one under test. clock: its clock.
        depth: schedules in flight; 2 is asynchronous scheduling.
    """

    def __init__(self, scheduler: Scheduler, clock: VirtualClock, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self.steps = 0
        self.first_run: dict[str, int] = {}
        self.added: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self._requests: dict[str, Request] = {}
        self._depth = depth
        self._executor = FakeExecutor(scheduler.init)
        self._flying: deque[tuple[Schedule, StepResult]] = deque()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        self.added[request.request_id] = self.steps
        self.outputs[request.request_id] = []

    def abort(self, request_id: str) -> None:
        request = self.scheduler.finish(request_id, FinishReason.ABORT)
        if request is not None:
            self._end(request_id, FinishReason.ABORT)
            self._check_flying()

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        for row in schedule.rows:
            self.first_run.setdefault(row.request_id, self.steps)
        self._flying.append((schedule, self._executor.run(schedule)))
        if len(self._flying) >= self._depth:
            self._land()
        self._check_flying()
        self.scheduler.init.allocator.check()
        self.steps += 1
        self.clock.advance(STEP_SECONDS)

    def drain(self, limit: int = 5_000) -> None:
        """Run to the end; everything must have ended and every block be free."""
        while self.scheduler.has_work() or self._flying:
            if self.scheduler.has_work():
                self.step()
            else:
                self._land()
            assert self.steps < limit, f"no end after {limit} steps: {self.scheduler.stats()}"
        assert set(self.reasons) == set(self._requests), "a request has not ended"
        stats = self.scheduler.init.allocator.stats()
        assert stats.used == 0, "blocks were lost"

    def check_outputs(self) -> None:
        """Every request that ran to its end has exactly the output that it has alone."""
        for name, request in self._requests.items():
            output, reason = expected_output(request)
            if self.reasons[name] is FinishReason.ABORT:
                assert self.outputs[name] == output[: len(self.outputs[name])], f"{name} went astray"
            else:
                assert (self.outputs[name], self.reasons[name]) == (output, reason), f"{name} went astray"

    def _land(self) -> None:
        schedule, result = self._flying.popleft()
        for update in self.scheduler.update(schedule, result):
            self._take(update)

    def _check_flying(self) -> None:
        """A step that has not been updated may still write the blocks of its rows."""
        for schedule, _ in self._flying:
            for row in schedule.rows:
                owned = self.scheduler.init.allocator.blocks(row.request_id)
                assert owned, f"{row.request_id} gave up its blocks while a step uses them"

    def _take(self, update: RequestUpdate) -> None:
        name = update.request.request_id
        assert name not in self.reasons, "an update came after the end"
        self.outputs[name].extend(update.new_token_ids)
        if update.request.finish_reason is not None:
            self._end(name, update.request.finish_reason)

    def _end(self, name: str, reason: FinishReason) -> None:
        assert name not in self.reasons, "a request ended twice"
        self.reasons[name] = reason


def make_request(
    name: str, prompt: Sequence[int], max_tokens: int, clock: Callable[[], float], **fields: object
) -> Request:
    """A request of the simulator."""
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min(2, max_tokens))
    return Request(name, tuple(prompt), params, clock(), max_tokens, frozenset({STOP}), **fields)  # type: ignore[arg-type]
