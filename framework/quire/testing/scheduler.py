"""Conformance of schedulers: random traffic through `simulation`, and each promise by itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from quire.contract.kv import KVAllocator, KVInit, PrefixQuery
from quire.contract.request import FinishReason, RowResult, StepResult
from quire.contract.scheduling import PolicyInit, Scheduler, SchedulerInit, SchedulerPolicy
from quire.errors import RequestError
from quire.params import SamplingParams
from quire.testing.clock import VirtualClock
from quire.testing.simulation import VOCAB, Simulation, make_request


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
        """Random arrivals, lengths, priorities, forks and aborts in pools that are often short: all end once, with the
        output they have alone, whether steps overlap or not; no step is over its budget.

        If it fails: the assertion names what went wrong; run `Simulation` with the same seed and look at the schedules
        before it.
        """
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
        """A request of the lowest priority starts within a bounded time although better ones keep coming.

        If it fails: go through the queue in the order of the policy's keys, which age; keep nobody back for being hard
        to fit.
        """
        simulation = self.make(scheduler_class, allocator_class, policy_class, max_num_seqs=1)
        simulation.add(make_request("patient", [1, 2, 3], 2, simulation.clock, priority=5))
        for index in range(1_000):
            for twin in ("a", "b"):  # two in three steps of which each needs two: more than can be served
                simulation.add(make_request(f"{index}{twin}", [index % VOCAB, 4], 2, simulation.clock, priority=0))
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
        """While a long prompt is computed in chunks, a running request gets a token in every step.

        If it fails: schedule decodes first and give prompts what is left of the budget.
        """
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
        """A prompt that the whole pool cannot hold, and an id in use, are refused and leave nothing behind.

        If it fails: raise RequestError in `add` before anything is kept.
        """
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
        """A request that outgrows the pool ends with `length`, not in an endless preemption.

        If it fails: end a request whose tokens fill the pool, and never preempt the only one that runs.
        """
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
        """A row that failed ends its request with `error`, and what it published is not found any more.

        If it fails: call the allocator's `discard`, not `free`, for a row with an error, and go on with the others.
        """
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
        allocator = scheduler.init.allocator
        assert allocator.match_prefix(PrefixQuery([ord("b")] * 7)).num_tokens == 0
        assert allocator.match_prefix(PrefixQuery([ord("g")] * 7)).num_tokens >= 4

    def test_requests_that_need_their_tokens_wait_for_them(
        self,
        scheduler_class: type[Scheduler],
        allocator_class: type[KVAllocator],
        policy_class: type[SchedulerPolicy],
    ) -> None:
        """With steps overlapping, such a request is scheduled when all its tokens are known; others do not wait.

        If it fails: ask `init.needs_host_tokens` for the request's parameters, and leave it out of a schedule while it
        has pending tokens.
        """
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
        """A second request with the same prompt computes only what the cache lacks, at least one token.

        If it fails: match all but the last token, and set `num_cached_tokens` when the request is first admitted.
        """
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
        """A request that wants log probabilities of its prompt takes nothing from the cache.

        If it fails: match an empty prefix for it: every position's hidden state is needed.
        """
        simulation = self.make(scheduler_class, allocator_class, policy_class)
        prompt = list(range(1, 14))
        simulation.add(make_request("first", prompt, 1, simulation.clock))
        simulation.drain()
        second = make_request("second", prompt, 1, simulation.clock)
        second.params = SamplingParams(prompt_logprobs=0, max_tokens=1)
        simulation.add(second)
        assert simulation.scheduler.schedule().num_tokens == 13
