"""Conformance of schedulers: a simulator with a virtual clock and an executor that knows what every KV slot holds.

The fake model's next token is a function of all tokens before it, so a wrong block, a lost token or
a forgotten recompute changes the output, and is found also where the row's own check did not see it.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from quire.contract.kv import KVAllocator, KVInit
from quire.contract.request import FinishReason, Request, RowResult, Schedule, ScheduledRow, StepResult
from quire.contract.scheduling import PolicyInit, RequestUpdate, Scheduler, SchedulerInit, SchedulerPolicy
from quire.errors import RequestError
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

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        for row in schedule.rows:
            self.first_run.setdefault(row.request_id, self.steps)
        self._flying.append((schedule, self._executor.run(schedule)))
        if len(self._flying) >= self._depth:
            self._land()
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


class SchedulerConformance:
    """What every scheduler must hold. Subclass, and give the three fixtures."""

    @pytest.fixture
    def scheduler_class(self) -> type[Scheduler]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `scheduler_class`")

    @pytest.fixture
    def allocator_class(self) -> type[KVAllocator]:
        """The allocator to run it on."""
        raise pytest.UsageError("define the fixture `allocator_class`")

    @pytest.fixture
    def policy_class(self) -> type[SchedulerPolicy]:
        """The policy to run it with."""
        raise pytest.UsageError("define the fixture `policy_class`")

    def make(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
        *,
        num_blocks: int = 40,
        max_num_seqs: int = 4,
        budget: int = 16,
        depth: int = 1,
        needs_host_tokens: Callable[[SamplingParams], bool] = lambda params: False,
    ) -> Simulation:
        clock = VirtualClock()
        init = SchedulerInit(
            allocator=allocator_class(KVInit(num_blocks, 4)),
            policy=policy_class(PolicyInit()),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=64,
            clock=clock,
            needs_host_tokens=needs_host_tokens,
        )
        return Simulation(scheduler_class(init), clock, depth)

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("seed", range(12))
    def test_random_traffic(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
        seed: int,
        depth: int,
    ) -> None:
        """Random arrivals, lengths, priorities, forks and aborts in pools that are often short: all end once,
        with the output they have alone, whether steps overlap or not."""
        rng = random.Random(seed)
        simulation = self.make(
            scheduler_class,
            allocator_class,
            policy_class,
            num_blocks=rng.choice((10, 14, 30)),
            max_num_seqs=rng.choice((1, 3, 6)),
            budget=rng.choice((1, 5, 16)),
            depth=depth,
        )
        self.traffic(simulation, rng, num_requests=25)
        simulation.drain()
        simulation.check_outputs()

    def traffic(self, simulation: Simulation, rng: random.Random, num_requests: int) -> None:
        """Arrivals, forks and aborts between steps."""
        for index in range(num_requests):
            shared = [7] * rng.randrange(12)
            prompt = shared + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 9))]
            seed, count = rng.randrange(100), rng.choice((1, 1, 1, 3))
            for child in range(count):
                parent = f"{index}.0" if child else None
                request = make_request(
                    f"{index}.{child}",
                    prompt,
                    rng.randrange(1, 12),
                    simulation.clock,
                    seed=seed + child,
                    fork_of=parent,
                    priority=rng.randrange(3),
                )
                simulation.add(request)
            for _ in range(rng.randrange(4)):
                if simulation.scheduler.has_work():
                    simulation.step()
            if rng.random() < 0.15:
                simulation.abort(f"{rng.randrange(index + 1)}.0")

    def test_nobody_waits_for_ever(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A request of the lowest priority starts within a bounded time although better ones keep coming."""
        simulation = self.make(scheduler_class, allocator_class, policy_class, max_num_seqs=1)
        simulation.add(make_request("patient", [1, 2, 3], 2, simulation.clock, priority=5))
        for index in range(3_000):
            simulation.add(make_request(f"r{index}", [index % VOCAB, 4], 2, simulation.clock, priority=0))
            for _ in range(3):
                simulation.step()
            simulation.clock.advance(1.0)
            if "patient" in simulation.first_run:
                break
        assert "patient" in simulation.first_run, "starved"
        simulation.drain(limit=50_000)

    def test_long_prompts_do_not_stop_decoding(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """While a long prompt is computed in chunks, a running request gets a token in every step."""
        simulation = self.make(scheduler_class, allocator_class, policy_class, budget=8)
        simulation.add(make_request("chat", [1, 2, 3], 20, simulation.clock, seed=3))
        simulation.step()
        simulation.add(make_request("essay", list(range(1, 41)), 2, simulation.clock))
        before = len(simulation.outputs["chat"])
        for _ in range(4):
            simulation.step()
        assert len(simulation.outputs["chat"]) == before + 4
        simulation.drain()
        simulation.check_outputs()

    def test_impossible_requests_are_refused(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A prompt that the whole pool cannot hold, and an id in use, are refused and leave nothing behind."""
        simulation = self.make(scheduler_class, allocator_class, policy_class, num_blocks=5)
        with pytest.raises(RequestError, match="KV"):
            simulation.scheduler.add(make_request("big", [1] * 17, 1, simulation.clock))
        assert not simulation.scheduler.has_work()
        simulation.add(make_request("a", [1], 1, simulation.clock))
        with pytest.raises(RequestError, match="in use"):
            simulation.scheduler.add(make_request("a", [1], 1, simulation.clock))
        simulation.drain()

    def test_a_lone_request_fills_the_pool_and_ends(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A request that outgrows the pool ends with `length`, not in an endless preemption."""
        simulation = self.make(scheduler_class, allocator_class, policy_class, num_blocks=4)
        request = make_request("a", [1, 2, 3], 50, simulation.clock, seed=9)
        request.stop_token_ids = frozenset()
        simulation.add(request)
        simulation.drain()
        assert simulation.reasons["a"] is FinishReason.LENGTH
        assert len(simulation.outputs["a"]) == 3 * 4 - 3

    def test_errors_end_one_request(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A row that failed ends its request with `error`, and what it published is not found any more."""
        simulation = self.make(scheduler_class, allocator_class, policy_class)
        scheduler = simulation.scheduler
        for name in ("good", "bad"):
            scheduler.add(make_request(name, [ord(name[0])] * 7, 5, simulation.clock))
        # The first step goes well and publishes blocks; the second one fails.
        for failing in ("", "bad"):
            schedule = scheduler.schedule()
            rows = tuple(
                RowResult(row.request_id, 1, error="broken" if row.request_id == failing else None)
                for row in schedule.rows
            )
            result = StepResult(schedule.step_id, rows)
            updates = {update.request.request_id: update for update in scheduler.update(schedule, result)}
        assert updates["bad"].request.finish_reason is FinishReason.ERROR
        assert (updates["bad"].error, updates["bad"].new_token_ids) == ("broken", ())
        assert updates["good"].request.finish_reason is None
        from quire.contract.kv import PrefixQuery

        allocator = scheduler.init.allocator
        assert allocator.match_prefix(PrefixQuery([ord("b")] * 7)).num_tokens == 0
        assert allocator.match_prefix(PrefixQuery([ord("g")] * 7)).num_tokens >= 4

    def test_requests_that_need_their_tokens_wait_for_them(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """With steps overlapping, such a request is scheduled when all its tokens are known; others do not wait."""
        bound = SamplingParams(max_tokens=9, min_tokens=9, seed=1)
        simulation = self.make(
            scheduler_class, allocator_class, policy_class, depth=2, needs_host_tokens=lambda params: params == bound
        )
        requests = [make_request(name, [3, 1, 4], 9, simulation.clock, seed=7) for name in ("bound", "free")]
        requests[0].params = bound
        for request in requests:
            request.stop_token_ids = frozenset()
            simulation.add(request)
        free_steps = 0
        while "free" not in simulation.reasons:
            simulation.step()
            free_steps += 1
            assert requests[0].num_pending_tokens <= 1
        assert len(simulation.outputs["bound"]) <= 6, "it was scheduled before its token was known"
        assert free_steps <= 10
        simulation.drain()
        simulation.check_outputs()

    def test_prefix_hits_are_counted_and_used(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A second request with the same prompt computes only what the cache lacks, at least one token."""
        simulation = self.make(scheduler_class, allocator_class, policy_class)
        prompt = list(range(1, 14))
        simulation.add(make_request("first", prompt, 1, simulation.clock))
        simulation.drain()
        second = make_request("second", prompt, 1, simulation.clock)
        simulation.add(second)
        schedule = simulation.scheduler.schedule()
        assert second.num_cached_tokens >= 12
        assert schedule.num_tokens == 13 - second.num_cached_tokens >= 1

    def test_prompt_logprobs_compute_the_whole_prompt(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """A request that wants log probabilities of its prompt takes nothing from the cache."""
        simulation = self.make(scheduler_class, allocator_class, policy_class)
        prompt = list(range(1, 14))
        simulation.add(make_request("first", prompt, 1, simulation.clock))
        simulation.drain()
        second = make_request("second", prompt, 1, simulation.clock)
        second.params = SamplingParams(prompt_logprobs=0, max_tokens=1)
        simulation.add(second)
        assert simulation.scheduler.schedule().num_tokens == 13
