"""What an engine says of itself while it works: the allocator's own truth, here and from a child process."""

import asyncio

import pytest
from quire import AsyncLLM, EngineDead, SamplingParams

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
            if busy.num_running == 4 and len(busy.sequences) == 4:
                break
        for index in (20, 21):
            await llm.abort(f"r{index}")
        await asyncio.gather(*tasks)
        return empty, busy, await llm.view()

    empty, busy, after = asyncio.run(main())
    assert (empty.num_blocks, empty.sequences, empty.num_running, empty.num_step_tokens) == (119, (), 0, 0)
    tables = {one.sequence_id: one.block_ids for one in busy.sequences}
    assert set(tables) == {"r20#0", "r20#1", "r21#0", "r21#1"}
    assert all(0 < block <= busy.num_blocks for table in tables.values() for block in table)
    assert tables["r20#0"][:3] == tables["r20#1"][:3]
    assert tables["r20#0"][-1] != tables["r20#1"][-1]
    assert busy.num_step_tokens > 0
    assert after.sequences == ()
    assert after.num_cached_blocks > 0
    llm.shutdown()
    with pytest.raises(EngineDead):
        asyncio.run(llm.view())
