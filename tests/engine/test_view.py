"""What an engine says of itself while it works: the allocator's own truth, here and from a child process."""

import asyncio
from collections import Counter

import pytest
from quire import LLM, AsyncLLM, EngineDead, SamplingParams
from quire.engine.engine import NUM_STEPS

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, n=2)


@pytest.mark.parametrize("allocator", ["paged", "radix"])
@pytest.mark.parametrize("process", [False, True], ids=["here", "child"])
def test_the_view_shows_who_holds_what(checkpoint, allocator, process):
    llm = AsyncLLM(
        checkpoint("llama"), dtype="float32", num_kv_blocks=120, block_size=8, kv_allocator=allocator, process=process
    )

    async def main():
        empty = await llm.view()
        prompt = [5, 6, 7, 8, 9, 10, 11, 12] * 3

        async def consume(index):
            return [delta async for delta in llm.stream([*prompt, index], LONG, request_id=f"r{index}")]

        tasks = [asyncio.create_task(consume(index)) for index in (20, 21)]
        for _ in range(500):
            await asyncio.sleep(0.005)
            busy = await llm.view()
            if busy.num_running == 4 and all(len(one.block_ids) > 4 for one in busy.sequences):
                break
        for index in (20, 21):
            await llm.abort(f"r{index}")
        await asyncio.gather(*tasks)
        return empty, busy, await llm.view()

    empty, busy, after = asyncio.run(main())
    assert (empty.num_blocks, empty.block_size, empty.num_running) == (119, 8, 0)
    assert empty.sequences == empty.steps == empty.cached_block_ids == ()
    tables = {one.sequence_id: one.block_ids for one in busy.sequences}
    assert set(tables) == {"r20#0", "r20#1", "r21#0", "r21#1"}
    assert all(0 < block <= busy.num_blocks for table in tables.values() for block in table)
    assert tables["r20#0"][:3] == tables["r20#1"][:3]
    assert tables["r20#0"][-1] != tables["r20#1"][-1]
    assert [step.step_id for step in busy.steps] == sorted({step.step_id for step in busy.steps})
    assert busy.steps[-1].num_tokens == busy.steps[-1].num_sampled == busy.steps[-1].num_rows == 4
    for one in busy.sequences:
        assert (one.status, one.num_prompt_tokens) == ("running", 25)
        assert 25 <= one.num_computed_tokens <= len(one.block_ids) * 8
        assert one.num_tokens - one.num_computed_tokens in (0, 1)  # the newest token's slot is granted with its step
    assert after.sequences == ()
    assert len(after.cached_block_ids) == after.num_cached_blocks > 0
    llm.shutdown()
    with pytest.raises(EngineDead):
        asyncio.run(llm.view())


@pytest.mark.parametrize("allocator", ["paged", "radix"])
def test_every_block_is_accounted_for_in_every_step(checkpoint, allocator):
    """A pool too small for its requests: reference counts, the queue and preemptions, against the allocator itself."""
    llm = LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=25, block_size=8, kv_allocator=allocator)
    engine = llm.engine
    truth = engine.parts.allocator
    for index in range(4):
        prompt = [5, 6, 7, 8, 9, 10, 11, 12] * 2
        engine.add(engine.prepare(f"r{index}", [*prompt, 20 + index], LONG.model_copy(update={"max_tokens": 60})))
    seen = set()
    while engine.has_work():
        engine.step()
        view = engine.view()
        owners = Counter(block for one in view.sequences for block in one.block_ids)
        assert owners == {block: count for block, count in enumerate(truth._refs) if count}
        assert set(view.cached_block_ids) == set(truth._index.parked())
        assert owners.keys().isdisjoint(view.cached_block_ids)
        for one in view.sequences:
            assert one.block_ids == truth.blocks(one.sequence_id)
            assert bool(one.block_ids) == (one.status == "running")
        statuses = Counter(one.status for one in view.sequences)
        assert statuses["running"] == view.num_running
        assert statuses["waiting"] + statuses["preempted"] == view.num_waiting
        seen |= statuses.keys() | {f"shared {max(owners.values(), default=0) > 1}"}
    assert seen >= {"running", "waiting", "preempted", "shared True"}
    assert view.num_preemptions > 0
    assert view.num_hit_tokens > 0
    assert view.num_query_tokens > view.num_hit_tokens
    assert len(view.steps) == NUM_STEPS or view.steps[0].step_id == 0
    llm.shutdown()
