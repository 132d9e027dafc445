"""The threaded front end: streams, aborts, storms, and the death of the loop."""

import asyncio
import random

import pytest
from quire import AsyncLLM, EngineDead, RequestError, SamplingParams
from quire.engine.engine import MAX_FAILED_STEPS, Engine

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


OPTIONS = {"dtype": "float32", "num_kv_blocks": 80, "block_size": 8, "max_num_seqs": 8}


@pytest.fixture
def here(checkpoint):
    """An engine in this process, for tests that reach into it."""
    engine = AsyncLLM(checkpoint("llama"), **OPTIONS)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def child(checkpoint):
    engine = AsyncLLM(checkpoint("llama"), **OPTIONS, process=True)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def overlapping(checkpoint):
    """One that launches a step while the one before it runs, in a process of its own."""
    engine = AsyncLLM(checkpoint("llama"), **OPTIONS, process=True, async_scheduling=True)
    yield engine
    engine.shutdown()


@pytest.fixture(params=["here", "child", "overlapping"])
def llm(request):
    """Whoever uses an engine need not know where it runs."""
    return request.getfixturevalue(request.param)


async def collect(llm, prompt, params=GREEDY, **options):
    return [delta async for delta in llm.stream(prompt, params, **options)]


async def begun(llm, prompt, **options):
    """A task that collects a long stream, which has told its first delta."""
    first = asyncio.Event()

    async def read():
        deltas = []
        async for delta in llm.stream(prompt, LONG, **options):
            deltas.append(delta)
            first.set()
        return deltas

    task = asyncio.create_task(read())
    await first.wait()
    return task


async def quiet(llm):
    """Wait until the engine has nothing left to do."""
    for _ in range(500):
        await llm.check_health()
        queues = llm.engine.scheduler_stats()
        if not llm.engine.has_work() and queues.num_waiting == queues.num_running == llm.engine.kv_stats().used == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine does not come to rest")


def test_concurrent_streams_each_end_once(llm):
    async def main():
        return await asyncio.gather(*(collect(llm, [index + 3, 7, 8]) for index in range(30)))

    for deltas in asyncio.run(main()):
        assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert sum(len(delta.token_ids) for delta in deltas) == 12
        assert deltas[-1].finish_reason == "length"


def test_a_bad_request_fails_in_the_callers_stack(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.prepare([])

    async def main():
        with pytest.raises(RequestError, match="max_model_len"):
            await collect(llm, [5] * 300)
        return await collect(llm, [5])

    assert asyncio.run(main())[-1].finished


def test_what_there_is_no_room_for_is_refused(llm):
    with pytest.raises(RequestError, match="room for 254 tokens"):
        llm.prepare([3, 4], SamplingParams(max_tokens=None, min_tokens=255))
    llm.prepare([3, 4], SamplingParams(max_tokens=None, min_tokens=254))
    with pytest.raises(RequestError, match="priority is"):
        llm.prepare([3, 4], priority=2**40)


def test_cancellation_frees_blocks(llm):
    async def main():
        task = asyncio.create_task(collect(llm, [3, 4], LONG))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if llm.engine.kv_stats().used > 0:
                break
        assert llm.engine.kv_stats().used > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await quiet(llm)

    asyncio.run(main())
    assert llm.engine.kv_stats().used == 0


def test_run_hands_over_what_a_stream_yields(llm):
    async def main():
        taken = []
        await llm.run(llm.prepare([3, 4], GREEDY), taken.append)
        return taken, await collect(llm, [3, 4])

    taken, streamed = asyncio.run(main())
    assert [delta.finished for delta in taken] == [False] * (len(taken) - 1) + [True]
    assert [t for delta in taken for t in delta.token_ids] == [t for delta in streamed for t in delta.token_ids]


def test_what_take_raises_comes_out_and_ends_the_request(llm):
    async def main():
        taken = []

        def take(delta):
            taken.append(delta)
            raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            await llm.run(llm.prepare([3, 4], LONG), take)
        await quiet(llm)
        return taken

    assert len(asyncio.run(main())) == 1


def test_a_run_that_is_cancelled_takes_nothing_more(llm):
    async def main():
        taken = []
        began = asyncio.Event()

        def take(delta):
            taken.append(delta)
            began.set()

        task = asyncio.create_task(llm.run(llm.prepare([3, 4], LONG), take))
        await began.wait()
        task.cancel()
        count = len(taken)
        with pytest.raises(asyncio.CancelledError):
            await task
        await quiet(llm)
        return len(taken) - count

    assert asyncio.run(main()) == 0


def test_abort_by_id_gives_a_final_delta(llm):
    async def main():
        task = await begun(llm, [3, 4], request_id="mine")
        await llm.abort("mi")  # a prefix of an id is no id
        await llm.abort("mine")
        return await task

    deltas = asyncio.run(main())
    assert (deltas[-1].finish_reason, deltas[-1].finished) == ("abort", True)


def test_ids_in_use_are_refused(llm):
    async def main():
        first = await begun(llm, [3], request_id="same")
        with pytest.raises(RequestError, match="in use"):
            await collect(llm, [4], request_id="same")
        await llm.abort("same")
        assert (await first)[-1].finish_reason == "abort"
        assert (await collect(llm, [4], request_id="same"))[-1].finish_reason == "length"

    asyncio.run(main())


def test_abort_storm_ends_with_all_blocks_free(llm):
    rng = random.Random(5)

    async def client(index):
        prompt = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(n=rng.choice((1, 1, 3)), seed=index, max_tokens=rng.randrange(1, 30), ignore_eos=True)
        await asyncio.sleep(rng.random() * 0.5)
        count = 0
        async for _ in llm.stream(prompt, params):
            count += 1
            if index % 2 and count > rng.randrange(6):
                return "left"
        return "done"

    async def main():
        outcomes = await asyncio.gather(*(client(index) for index in range(200)))
        await quiet(llm)
        return outcomes

    outcomes = asyncio.run(main())
    assert {"left", "done"} == set(outcomes)
    stats = llm.engine.kv_stats()
    assert (stats.used, stats.free) == (0, stats.total)
    assert not llm._streams
    if isinstance(llm.engine, Engine):
        llm.engine.parts.allocator.check()


def test_everybody_is_told_when_the_loop_dies(here, monkeypatch):
    llm = here

    async def main():
        tasks = await asyncio.gather(*(begun(llm, [index + 3]) for index in range(5)))
        monkeypatch.setattr(llm.engine, "step", lambda: 1 / 0)
        for deltas in await asyncio.gather(*tasks):
            assert (deltas[-1].finish_reason, deltas[-1].finished) == ("error", True)
            assert "engine has ended" in deltas[-1].error
        with pytest.raises(EngineDead):
            await collect(llm, [3])
        with pytest.raises(EngineDead):
            await llm.check_health()

    asyncio.run(main())


def test_steps_that_keep_failing_end_the_engine(here, monkeypatch):
    llm = here
    monkeypatch.setattr(llm.engine.parts.executor._model, "forward", lambda *args: 1 / 0)

    async def main():
        reasons = []
        for index in range(MAX_FAILED_STEPS):
            reasons.append((await collect(llm, [index + 3]))[-1].finish_reason)
        with pytest.raises(EngineDead):
            await collect(llm, [3])
        return reasons

    assert asyncio.run(main()) == ["error"] * MAX_FAILED_STEPS


@pytest.mark.parametrize("process", [False, True])
def test_shutdown_ends_streams_and_is_idempotent(checkpoint, process):
    llm = AsyncLLM(checkpoint("llama"), dtype="float32", num_kv_blocks=80, process=process)

    async def main():
        # More than the pool holds at once, so that some are far from their end.
        others = [asyncio.create_task(collect(llm, [3], LONG)) for _ in range(16)]
        first = await begun(llm, [3])
        await asyncio.to_thread(llm.shutdown)
        return await asyncio.gather(first, *others, return_exceptions=True)

    ends = [end if isinstance(end, EngineDead) else end[-1].finish_reason for end in asyncio.run(main())]
    assert ends[0] == "error"
    assert all(isinstance(end, EngineDead) or end in ("length", "error") for end in ends)
    llm.shutdown()
    with pytest.raises(EngineDead):
        llm.prepare([3])
