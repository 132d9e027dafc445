"""What people are shown of an engine: its queues, who holds which blocks, its last steps. No token, no text."""

from __future__ import annotations

from collections.abc import Iterable

from quire.contract.kv import KVAllocator
from quire.contract.metrics import StepStats
from quire.contract.request import Request
from quire.contract.scheduling import Scheduler
from quire.facade import EngineView, SequenceView, StepView


def engine_view(
    allocator: KVAllocator, scheduler: Scheduler, requests: Iterable[Request], steps: Iterable[StepStats]
) -> EngineView:
    """A snapshot; to be taken between two steps, where all of these agree."""
    kv, queues = allocator.stats(), scheduler.stats()
    return EngineView(
        num_blocks=kv.total,
        block_size=allocator.init.block_size,
        num_cached_blocks=kv.cached,
        cached_block_ids=allocator.cached_blocks(),
        num_waiting=queues.num_waiting,
        num_running=queues.num_running,
        num_preemptions=queues.num_preemptions,
        num_evictions=kv.evictions,
        num_query_tokens=kv.query_tokens,
        num_hit_tokens=kv.hit_tokens,
        sequences=tuple(_sequence(request, allocator) for request in requests),
        steps=tuple(_step(stats) for stats in steps),
    )


def _sequence(request: Request, allocator: KVAllocator) -> SequenceView:
    return SequenceView(
        sequence_id=request.request_id,
        status=request.status.value,
        num_prompt_tokens=request.num_prompt_tokens,
        num_tokens=request.num_tokens,
        num_computed_tokens=request.num_computed_tokens,
        block_ids=tuple(allocator.blocks(request.request_id)),
    )


def _step(stats: StepStats) -> StepView:
    return StepView(stats.step_id, stats.time, stats.num_rows, stats.num_tokens, stats.num_sampled)
