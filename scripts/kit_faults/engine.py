"""Faulty KV allocators, schedulers, policies and executors: subclasses of the core's."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import Future

from quire.engine.inproc import InprocExecutor
from quire.kv.paged import HashIndex, PagedAllocator
from quire.kv.pool import PooledAllocator
from quire.plugin import Allocation, FinishReason, KVBudget, PrefixQuery
from quire.scheduling.continuous import ContinuousScheduler
from quire.scheduling.policies import FcfsPolicy

from kit_faults.fault import Fault


class GrantsNullBlock(PagedAllocator):
    def __init__(self, init):
        super().__init__(init)
        self._plain[0] = 0


class LeaksOnRefusal(PagedAllocator):
    def allocate(self, request_id, num_tokens, hit=None):
        granted = super().allocate(request_id, num_tokens, hit)
        if granted is None and self._plain:
            self._plain.pop()
        return granted


class FreesTwice(PagedAllocator):
    """Gives an adopted block back although its first owner still has it."""

    def free(self, request_id):
        blocks = self.blocks(request_id)
        super().free(request_id)
        if blocks and self._refs[blocks[0]]:
            self._plain.append(blocks[0])


class HitsOtherContent(PagedAllocator):
    """Takes the first tokens of a block for all of them."""

    def __init__(self, init):
        class FirstTokens(HashIndex):
            def match(self, query):
                size = init.block_size
                tokens = [t if i % size < 2 else query.token_ids[i - i % size] for i, t in enumerate(query.token_ids)]
                return super().match(dataclasses.replace(query, token_ids=tokens))

            def publish(self, table, tokens):
                super().publish(table, (*tokens[:2], *(tokens[0] for _ in tokens[2:])))

        PooledAllocator.__init__(self, init, FirstTokens(init.block_size))


class IgnoresSalts(PagedAllocator):
    def match_prefix(self, query):
        return super().match_prefix(PrefixQuery(query.token_ids))

    def allocate(self, request_id, num_tokens, hit=None):
        return super().allocate(request_id, num_tokens, hit and dataclasses.replace(hit, salt=""))


class ForksWithoutCopy(PagedAllocator):
    def fork(self, parent_id, child_id, num_tokens):
        granted = super().fork(parent_id, child_id, num_tokens)
        return granted and Allocation(granted.block_ids)


class TrustsFailures(PagedAllocator):
    def discard(self, request_id):
        self.free(request_id)


class AlwaysCaches(PagedAllocator):
    def __init__(self, init):
        super().__init__(dataclasses.replace(init, enable_prefix_caching=True))


class OverBudget(ContinuousScheduler):
    def schedule(self):
        init = self.init
        self.init = dataclasses.replace(init, max_num_batched_tokens=init.max_num_batched_tokens + 1)
        try:
            return super().schedule()
        finally:
            self.init = init


class NewestFirst(ContinuousScheduler):
    """Whoever came last starts first."""

    def __init__(self, init):
        super().__init__(init)
        ordered = self._waiting.ordered
        self._waiting.ordered = lambda: iter(list(ordered())[::-1])


class LeaksSlots(ContinuousScheduler):
    """An aborted request keeps its slot."""

    def finish(self, request_id, reason):
        before = list(self._free_slots)
        request = super().finish(request_id, reason)
        self._free_slots[:] = before
        return request


class FreesInFlight(ContinuousScheduler):
    """An aborted request's blocks are granted anew while a step still writes them."""

    def finish(self, request_id, reason):
        self._allocator.free(request_id)
        return super().finish(request_id, reason)


class PublishesFailures(ContinuousScheduler):
    def _end(self, request, reason, *, trusted=True):
        super()._end(request, reason, trusted=True)


class EndsOneLate(ContinuousScheduler):
    def _stop_reason(self, request):
        reason = super()._stop_reason(request)
        late = reason is FinishReason.LENGTH and request.num_output_tokens == request.max_tokens
        return None if late else reason


class VictimIsNobody(FcfsPolicy):
    def pick_victim(self, running, view):
        return "nobody"


class KeysOfTwoLengths(FcfsPolicy):
    def key(self, request, now):
        return (request.arrival_time,) if request.priority else (request.arrival_time, 0.0)


class KeysAtRandom(FcfsPolicy):
    def __init__(self, init):
        super().__init__(init)
        self.rng = random.Random(0)

    def key(self, request, now):
        return (self.rng.random(),)


class ShortestFirstForEver(FcfsPolicy):
    """Long prompts starve."""

    def key(self, request, now):
        return (request.num_prompt_tokens,)


class NoBudgetWhenFull(FcfsPolicy):
    def token_budget(self, view):
        return view.max_num_batched_tokens * (view.free_blocks // view.total_blocks)


class LosesARow(InprocExecutor):
    def step(self, schedule):
        return _changed(super().step(schedule), lambda rows: rows[:-1] if len(rows) > 2 else rows)


class SortsRows(InprocExecutor):
    def step(self, schedule):
        return _changed(super().step(schedule), lambda rows: tuple(sorted(rows, key=lambda row: row.request_id)))


class KeepsSlots(InprocExecutor):
    """`released` is not told to the processors, so the next request of a slot inherits them."""

    def step(self, schedule):
        if self._runner is not None:
            self._runner._parts.pipeline.remove = lambda slot: None
        return super().step(schedule)


class ForgetsCopies(InprocExecutor):
    def step(self, schedule):
        return super().step(dataclasses.replace(schedule, copies=()))


class RaisesInStep(InprocExecutor):
    def step(self, schedule):
        future = super().step(schedule)
        future.result()
        return future


class AlwaysHealthy(InprocExecutor):
    def health(self):
        return None


class CountsOneLayer(InprocExecutor):
    def kv_budget(self):
        budget = super().kv_budget()
        return KVBudget(budget.bytes_per_block // 8, budget.free_bytes)


def _changed(future, change):
    changed = Future()
    if (error := future.exception()) is not None:
        changed.set_exception(error)
    else:
        result = future.result()
        changed.set_result(dataclasses.replace(result, rows=change(result.rows)))
    return changed


FAULTS = (
    Fault("the null block is granted", "kv_allocator", GrantsNullBlock),
    Fault("a refusal leaks a block", "kv_allocator", LeaksOnRefusal),
    Fault("a shared block is freed twice", "kv_allocator", FreesTwice),
    Fault("hit on unequal content", "kv_allocator", HitsOtherContent),
    Fault("tenants share through the cache", "kv_allocator", IgnoresSalts),
    Fault("fork does not copy the partial block", "kv_allocator", ForksWithoutCopy),
    Fault("failed content stays published", "kv_allocator", TrustsFailures),
    Fault("caching cannot be switched off", "kv_allocator", AlwaysCaches),
    Fault("a step over its budget", "scheduler", OverBudget),
    Fault("the newest starts first: starvation", "scheduler", NewestFirst),
    Fault("an abort leaks its slot", "scheduler", LeaksSlots),
    Fault("blocks freed while a step uses them", "scheduler", FreesInFlight),
    Fault("what a failed row wrote is shared", "scheduler", PublishesFailures),
    Fault("one token too many", "scheduler", EndsOneLate),
    Fault("victim that was not offered", "scheduler_policy", VictimIsNobody),
    Fault("keys of two lengths", "scheduler_policy", KeysOfTwoLengths),
    Fault("order that is none", "scheduler_policy", KeysAtRandom),
    Fault("long prompts starve", "scheduler_policy", ShortestFirstForEver),
    Fault("no budget when the pool is full", "scheduler_policy", NoBudgetWhenFull),
    Fault("a row is lost", "executor", LosesARow),
    Fault("rows in another order", "executor", SortsRows),
    Fault("a slot keeps its processors", "executor", KeepsSlots),
    Fault("copies are forgotten", "executor", ForgetsCopies),
    Fault("a failure is raised, not told", "executor", RaisesInStep),
    Fault("healthy before it has started", "executor", AlwaysHealthy),
    Fault("budget of a part of the layers", "executor", CountsOneLayer),
)
