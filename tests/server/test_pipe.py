"""The way of a stream's bytes: what waits goes out together, silence is filled, a reader that stops is given up."""

import asyncio

import pytest
from quire_server.sse import KEEP_ALIVE, Beat, EventStream, Pipe, StreamLimits

LIMITS = StreamLimits(keepalive=15.0, write_timeout=60.0)


class Reader:
    """A client; `ready` says whether it takes more."""

    def __init__(self):
        self.ready = asyncio.Event()
        self.ready.set()
        self.read = []
        self.is_open = True

    async def send(self, message):
        await self.ready.wait()
        self.read.append(message.get("body"))
        self.is_open = message.get("more_body", True)


def test_what_waits_goes_out_together(instantly):
    async def scenario():
        reader = Reader()
        pipe = Pipe(reader.send, LIMITS)
        task = asyncio.create_task(pipe.run())
        pipe.write(b"a")
        await asyncio.sleep(1)
        reader.ready.clear()
        for piece in (b"b", b"", b"c", b"d"):
            pipe.write(piece)
            await asyncio.sleep(1)
        reader.ready.set()
        await asyncio.sleep(1)
        pipe.write(b"e")
        pipe.close()
        await task
        assert not reader.is_open
        return reader.read

    assert instantly(scenario()) == [b"a", b"b", b"cd", b"e"]


def test_writes_keep_the_pace_and_streams_share_its_beat(instantly):
    """A write that follows another closely goes out with what comes until the beat."""

    async def scenario():
        limits = StreamLimits(keepalive=15.0, write_timeout=60.0, beat=Beat(1.0, per_stream=1.0))
        loop, written = asyncio.get_running_loop(), []
        began = loop.time()

        def reader(name):
            async def send(message):
                written.append((name, round(loop.time() - began, 1), message["body"]))

            return send

        pipes = {name: Pipe(reader(name), limits) for name in "ab"}
        tasks = [asyncio.create_task(pipe.run()) for pipe in pipes.values()]

        async def write(name, piece, wait):
            pipes[name].write(piece)
            await asyncio.sleep(wait)

        await write("a", b"1", 0.2)
        await write("b", b"1", 0.2)
        await write("a", b"2", 0.3)
        await write("b", b"2", 0.3)
        await write("a", b"3", 3)
        await write("a", b"4", 0.2)
        await write("a", b"5", 0.2)
        for pipe in pipes.values():
            pipe.close()
        await asyncio.gather(*tasks)
        return written

    both = [("a", 1.4, b"23"), ("b", 1.4, b"2")]
    end = [("b", 4.4, b""), ("a", 5.2, b"5")]
    assert instantly(scenario()) == [("a", 0.0, b"1"), ("b", 0.2, b"1"), *both, ("a", 4.0, b"4"), *end]


def test_the_beat_slows_with_open_streams_up_to_its_longest(instantly):
    async def scenario():
        beat = Beat(1.0, per_stream=0.25)
        limits, reader, seconds = StreamLimits(15.0, 60.0, beat), Reader(), []
        pipes = [Pipe(reader.send, limits) for _ in range(6)]
        tasks = []
        for pipe in pipes:
            tasks.append(asyncio.create_task(pipe.run()))
            await asyncio.sleep(0)
            seconds.append(beat.seconds)
        tasks[0].cancel()
        for pipe in pipes[1:]:
            pipe.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [*seconds, beat.seconds]

    assert instantly(scenario()) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.0]


def test_a_stream_that_ends_while_it_waits_leaves_the_beat_to_others(instantly):
    async def scenario():
        limits, readers = StreamLimits(15.0, 60.0, Beat(1.0, per_stream=1.0)), [Reader(), Reader()]
        tasks = []
        for reader in readers:
            pipe = Pipe(reader.send, limits)
            tasks.append(asyncio.create_task(pipe.run()))
            pipe.write(b"1")
            await asyncio.sleep(0.1)
            pipe.write(b"2")
        await asyncio.sleep(0.1)
        tasks[0].cancel()
        await asyncio.sleep(2)
        tasks[1].cancel()
        return [reader.read for reader in readers]

    assert instantly(scenario()) == [[b"1"], [b"1", b"2"]]


def test_comments_fill_silence_alone(instantly):
    async def scenario():
        reader = Reader()
        pipe = Pipe(reader.send, LIMITS)
        task = asyncio.create_task(pipe.run())
        for _ in range(4):
            await asyncio.sleep(14)
            pipe.write(b"x")
        await asyncio.sleep(40)
        pipe.close()
        await task
        return reader.read

    assert instantly(scenario()) == [b"x"] * 4 + [KEEP_ALIVE] * 2 + [b""]


def test_a_write_that_takes_too_long_ends_it(instantly):
    """Whichever it is: the last one has no bytes."""

    async def scenario(piece):
        reader = Reader()
        pipe = Pipe(reader.send, LIMITS)
        task = asyncio.create_task(pipe.run())
        await asyncio.sleep(1)
        reader.ready.clear()
        pipe.write(piece)
        pipe.close()
        await asyncio.sleep(59)
        assert not task.done()
        await asyncio.sleep(61)
        return task.cancelled()

    assert instantly(scenario(b"x"))
    assert instantly(scenario(b""))


def test_a_stream_ends_its_producer_with_its_reader(instantly):
    """A client that goes, and one that stops reading; the place is given back either way."""

    async def scenario(goes):
        reader, ended = Reader(), []

        async def produce(write):
            try:
                write(b"x")
                await asyncio.Event().wait()
            finally:
                ended.append("producer")

        async def receive():
            if goes:
                await asyncio.sleep(5)
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
            return None

        async def body(message):
            await asyncio.Event().wait()

        stream = EventStream(produce, LIMITS)
        stream._place.callback(ended.append, "place")
        await stream({"state": {"send_body": reader.send if goes else body}}, receive, reader.send)
        return ended

    assert instantly(scenario(True)) == instantly(scenario(False)) == ["producer", "place"]


def test_a_producer_that_fails_leaves_the_stream_open_ended(instantly):
    reader = Reader()

    async def produce(write):
        write(b"x")
        await asyncio.sleep(1)
        raise ValueError("an encoder, say")

    async def scenario():
        never = asyncio.Event()
        await EventStream(produce, LIMITS)({"state": {"send_body": reader.send}}, never.wait, reader.send)

    with pytest.raises(ValueError, match="an encoder"):
        instantly(scenario())
    assert reader.read == [None, b"x"]
    assert reader.is_open
