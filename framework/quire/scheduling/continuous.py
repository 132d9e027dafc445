"""The `continuous` scheduler: continuous batching with chunked prefill and preemption by recompute.

A step lets each request's computed tokens catch up with its tokens, within the token budget:
running requests first, in the order they were admitted, then waiting ones in the policy's order.
When a running request needs a block and none is free, the policy picks a victim, which gives up
its blocks and is recomputed later. A request preempted MAX_PREEMPTIONS times is not picked again as
long as there is another; the one that was admitted first is picked last, so somebody always gets ahead.

What one schedule does is final only when its step has been updated; a second schedule may be made
before that. Until then a request that ended keeps its blocks and its slot.
"""

from __future__ import annotations

from collections import Counter

from quire.contract.kv import Allocation, PrefixHit, PrefixQuery
from quire.contract.request import (
    FinishReason,
    Request,
    RequestStatus,
    RowResult,
    Schedule,
    ScheduledRow,
    StepResult,
    TokenLogprobs,
)
from quire.contract.scheduling import RequestUpdate, Scheduler, SchedulerInit, SchedulerStats, SchedulerView
from quire.errors import RequestError
from quire.scheduling.queue import WaitingQueue, view_of
from quire.scheduling.round import Round

MAX_PREEMPTIONS = 3


class ContinuousScheduler(Scheduler):
    """Decides each step; see the module's docstring."""

    def __init__(self, init: SchedulerInit) -> None:
        super().__init__(init)
        self._allocator, self._policy = init.allocator, init.policy
        self._waiting = WaitingQueue(init.policy, init.clock)
        # Tokens that the whole pool can hold for one request.
        self._capacity = init.allocator.stats().total * init.allocator.init.block_size
        self._longest = min(init.max_model_len, self._capacity)
        self._running: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self._free_slots = list(range(init.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []
        self._outstanding: Counter[str] = Counter()
        self._forkable: set[str] = set()
        self._untrusted: set[str] = set()
        self._prompt_logprobs_told: dict[str, int] = {}
        self._unhurried: set[str] = set()
        self._step_id = 0
        self._num_preemptions = self._num_finished = 0

    def add(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        room = self._capacity
        if request.num_prompt_tokens >= room:
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens:,} tokens; the KV cache holds {room:,}, prompt and output",
                param="prompt",
                remedy="shorten the prompt, or raise num_kv_blocks or kv_cache_memory",
            )
        self._requests[request.request_id] = request
        if self.init.needs_host_tokens(request.params):
            self._unhurried.add(request.request_id)
        self._waiting.push(request)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return None
        self._end(request, reason)
        return request

    def has_work(self) -> bool:
        return bool(self._requests or self._released)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(len(self._waiting), len(self._running), self._num_preemptions, self._num_finished)

    def schedule(self) -> Schedule:
        round_ = Round(self._step_id, tuple(self._released))
        self._step_id += 1
        self._released.clear()
        round_.budget = max(1, min(self._policy.token_budget(self._view()), self.init.max_num_batched_tokens))
        self._schedule_running(round_)
        if not round_.preempted:
            self._schedule_waiting(round_)
        for request_id in round_.rows:
            self._outstanding[request_id] += 1
        return round_.finish()

    def update(self, schedule: Schedule, result: StepResult) -> list[RequestUpdate]:
        updates = []
        for row, row_result in zip(schedule.rows, result.rows, strict=True):
            request = self._requests[row.request_id]
            self._outstanding[row.request_id] -= 1
            if request.is_finished:
                self._let_go(request)
            else:
                updates.append(self._update_row(request, row, row_result))
        return updates

    # Scheduling -------------------------------------------------------------------------------

    def _schedule_running(self, round_: Round) -> None:
        behind = [(request.num_tokens - request.num_computed_tokens, request) for request in self._running.values()]
        # Decodes first: a long prompt must not hold up everybody's next token.
        for missing, request in sorted(behind, key=_is_prefill):
            if round_.budget == 0:
                return
            if missing <= 0 or self._must_wait(request) or request.request_id not in self._running:
                continue
            count = min(missing, round_.budget)
            if self._make_room(request, count, round_):
                self._take_row(round_, request, count)

    def _must_wait(self, request: Request) -> bool:
        """Whether the next token depends on pending ones: the host follows them, or they may be the last."""
        pending = request.num_pending_tokens
        if not pending:
            return False
        return request.request_id in self._unhurried or request.num_output_tokens + pending >= request.max_tokens

    def _make_room(self, request: Request, count: int, round_: Round) -> bool:
        """Grant the request's blocks, preempting others if need be; False if it was preempted itself."""
        while True:
            allocation = self._allocator.allocate(request.request_id, request.num_computed_tokens + count)
            if allocation is not None:
                round_.grant(request, allocation)
                return True
            victim = self._victim(round_)
            if victim is None:
                return False
            self._preempt(victim, round_)
            if victim is request:
                return False

    def _victim(self, round_: Round) -> Request | None:
        """Whom to preempt: never a request that a step in flight still names, for its blocks are in use."""
        candidates = [
            request
            for request in self._running.values()
            if not self._outstanding[request.request_id] and request.request_id not in round_.rows
        ]
        unpinned = [request for request in candidates if request.num_preemptions < MAX_PREEMPTIONS]
        # The oldest keeps its blocks as long as there is anyone else, so somebody always gets ahead.
        eligible = unpinned or candidates[1:] or candidates
        if not eligible:
            return None
        choice = self._policy.pick_victim([view_of(request) for request in eligible], self._view())
        return self._running[choice]

    def _preempt(self, request: Request, round_: Round) -> None:
        self._allocator.free(request.request_id)
        self._forkable.discard(request.request_id)
        del self._running[request.request_id]
        self._give_slot_back(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(request)
        round_.preempted.append(request.request_id)

    def _schedule_waiting(self, round_: Round) -> None:
        for request in self._waiting.ordered():
            if round_.budget == 0 or not self._free_slots:
                return
            if not self._may_start(request):
                continue
            if self._running and not self._policy.admit(view_of(request), self._view()):
                return
            if not self._admit(request, round_):
                return

    def _may_start(self, request: Request) -> bool:
        """A forked request waits until its parent has computed the prompt, as long as the parent lives."""
        parent = self._requests.get(request.fork_of) if request.fork_of else None
        return parent is None or parent.is_finished or self._can_fork(parent)

    def _can_fork(self, parent: Request) -> bool:
        """Whether the parent's prompt is in the cache, computed by a step that has ended."""
        return parent.request_id in self._forkable

    def _admit(self, request: Request, round_: Round) -> bool:
        """Give the request blocks and a slot; False if the pool is short."""
        started = self._fork(request) or self._match(request, round_.budget)
        if started is None:
            return False
        allocation, num_cached = started
        request.num_computed_tokens = num_cached
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        self._waiting.remove(request.request_id)
        self._running[request.request_id] = request
        round_.enter(request)
        round_.grant(request, allocation)
        self._take_row(round_, request, min(request.num_tokens - num_cached, round_.budget))
        return True

    def _fork(self, request: Request) -> tuple[Allocation, int] | None:
        parent = self._requests.get(request.fork_of) if request.fork_of else None
        if parent is None or request.num_output_tokens or not self._can_fork(parent):
            return None
        # The last prompt token is computed again: its hidden state is what the first token is sampled from.
        num_shared = request.num_prompt_tokens - 1
        allocation = self._allocator.fork(parent.request_id, request.request_id, num_shared)
        if allocation is None:
            return None
        grown = self._allocator.allocate(request.request_id, num_shared + 1)
        if grown is None:
            self._allocator.free(request.request_id)
            return None
        return Allocation((*allocation.block_ids, *grown.block_ids), allocation.copies), num_shared

    def _match(self, request: Request, budget: int) -> tuple[Allocation, int] | None:
        # One token is left to compute, for something must be sampled from. Prompt log probabilities
        # need every position's hidden state, so such a request takes nothing from the cache.
        wants_all = request.params.prompt_logprobs is not None
        length = 0 if wants_all else request.num_tokens - 1
        if self._running and self._allocator.stats().free <= len(self._running):
            return None  # no room whatever is cached; spares hashing the prompt again in every step
        hit = self._allocator.match_prefix(PrefixQuery(request.token_ids[:length], request.cache_salt))
        if not self._leaves_reserve(min(request.num_tokens, hit.num_tokens + budget), hit):
            return None
        allocation = self._allocate_first(request, hit, budget)
        if allocation is None and hit.num_tokens and not self._running:
            # A block that is copied must be held meanwhile; alone in a small pool, the request does without.
            hit = PrefixHit(salt=hit.salt, num_query_tokens=hit.num_query_tokens)
            allocation = self._allocate_first(request, hit, budget)
        return None if allocation is None else (allocation, hit.num_tokens)

    def _allocate_first(self, request: Request, hit: PrefixHit, budget: int) -> Allocation | None:
        return self._allocator.allocate(request.request_id, min(request.num_tokens, hit.num_tokens + budget), hit)

    def _leaves_reserve(self, num_tokens: int, hit: PrefixHit) -> bool:
        """Keep one free block per running request, so that admitting does not preempt in the next step."""
        needed = -(-num_tokens // self._allocator.init.block_size) - len(hit.block_ids)
        return not self._running or self._allocator.stats().free - needed >= len(self._running)

    def _take_row(self, round_: Round, request: Request, count: int) -> None:
        first = request.num_computed_tokens
        samples = first + count == request.num_tokens
        round_.add_row(request, first, count, samples)
        request.num_computed_tokens += count
        request.num_pending_tokens += samples

    # Updating ---------------------------------------------------------------------------------

    def _update_row(self, request: Request, row: ScheduledRow, result: RowResult) -> RequestUpdate:
        request.num_pending_tokens -= row.samples
        if result.error is not None:
            self._end(request, FinishReason.ERROR, trusted=False)
            return RequestUpdate(request, error=result.error)
        new_ids: tuple[int, ...] = ()
        if row.samples and result.token_id is not None:
            request.output_token_ids.append(result.token_id)
            new_ids = (result.token_id,)
        prompt_logprobs = self._untold(request, row, result)
        computed = row.num_computed_tokens + row.num_new_tokens
        if row.num_computed_tokens < request.num_prompt_tokens <= computed:
            self._forkable.add(request.request_id)
        self._allocator.commit(request.request_id, request.token_ids, computed)
        reason = self._stop_reason(request) if new_ids else None
        if reason is not None:
            self._end(request, reason)
        logprobs = (result.logprobs,) if result.logprobs is not None else ()
        return RequestUpdate(request, new_ids, logprobs, prompt_logprobs)

    def _untold(self, request: Request, row: ScheduledRow, result: RowResult) -> tuple[TokenLogprobs, ...]:
        """Prompt log probabilities that were not told before a preemption."""
        if not result.prompt_logprobs:
            return ()
        told = self._prompt_logprobs_told.get(request.request_id, 0)
        end = row.num_computed_tokens + len(result.prompt_logprobs)
        self._prompt_logprobs_told[request.request_id] = max(told, end)
        return result.prompt_logprobs[max(0, told - row.num_computed_tokens) :]

    def _stop_reason(self, request: Request) -> FinishReason | None:
        token, count = request.output_token_ids[-1], request.num_output_tokens
        if token in request.stop_token_ids and count >= request.params.min_tokens:
            request.stop_reason = token if token in request.params.stop_token_ids else None
            return FinishReason.STOP
        if count >= request.max_tokens or request.num_prompt_tokens + count >= self._longest:
            return FinishReason.LENGTH
        return None

    def _end(self, request: Request, reason: FinishReason, *, trusted: bool = True) -> None:
        was_running = request.status is RequestStatus.RUNNING
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        self._num_finished += 1
        if was_running:
            del self._running[request.request_id]
        else:
            self._waiting.remove(request.request_id)
        if not trusted:
            self._untrusted.add(request.request_id)
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """Free what an ended request holds, unless a step in flight still names it."""
        key = request.request_id
        if self._outstanding[key]:
            return
        del self._outstanding[key], self._requests[key]
        self._forkable.discard(key)
        self._unhurried.discard(key)
        self._prompt_logprobs_told.pop(key, None)
        if key in self._untrusted:
            self._untrusted.remove(key)
            self._allocator.discard(key)
        self._allocator.free(key)
        if request.slot >= 0:
            self._give_slot_back(request)

    def _give_slot_back(self, request: Request) -> None:
        self._released.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _view(self) -> SchedulerView:
        stats = self._allocator.stats()
        return SchedulerView(
            now=self.init.clock(),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            free_blocks=stats.free,
            total_blocks=stats.total,
            max_num_seqs=self.init.max_num_seqs,
            max_num_batched_tokens=self.init.max_num_batched_tokens,
        )


def _is_prefill(behind: tuple[int, Request]) -> bool:
    return behind[0] > 1
