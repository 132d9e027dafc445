"""One timer for many waits: it ends the wait that it comes in, or the next one, and nothing else."""

import asyncio

import pytest
from quire_server.deadline import Deadline


def test_many_waits_before_it_and_none_after(instantly):
    async def waits():
        deadline = Deadline(asyncio.get_running_loop().time() + 1.0)
        for _ in range(9):
            assert await deadline.wait(asyncio.sleep(0.1, "done")) == "done"
        with pytest.raises(TimeoutError):
            await deadline.wait(asyncio.sleep(0.2))
        with pytest.raises(TimeoutError):
            await deadline.wait(asyncio.get_running_loop().create_future())
        assert asyncio.current_task().cancelling() == 0

    instantly(waits())


def test_between_two_waits_nothing_is_interrupted(instantly):
    async def waits():
        deadline = Deadline(asyncio.get_running_loop().time() + 1.0)
        await asyncio.sleep(5.0)  # the reader's own pace, as of a client that is slow to read
        with pytest.raises(TimeoutError):
            await deadline.wait(asyncio.get_running_loop().create_future())

    instantly(waits())


def test_it_moves_and_closes(instantly):
    async def waits():
        now = asyncio.get_running_loop().time()
        deadline = Deadline(now + 1.0)
        deadline.move(now + 3.0)
        await deadline.wait(asyncio.sleep(2.0))
        deadline.close()
        await deadline.wait(asyncio.sleep(2.0))

    instantly(waits())


@pytest.mark.parametrize("when", [1.0, 2.0])
def test_a_task_that_is_to_end_ends(instantly, when):
    """Cancelled from outside, before or at the same time."""

    async def waits():
        loop = asyncio.get_running_loop()

        async def work():
            await Deadline(loop.time() + 2.0).wait(loop.create_future())

        task = asyncio.create_task(work())
        loop.call_later(when, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    instantly(waits())
