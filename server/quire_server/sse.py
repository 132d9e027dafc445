"""A response of server-sent events (WHATWG HTML, section 9.2) that notices when its reader is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire_server.events import Event, Text, Tokens, Usage

Write = Callable[[bytes], None]

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
MAY_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""What the API's description says of a path that answers whole or in events."""


def event(data: object, name: str | None = None) -> bytes:
    """One event with JSON data."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class Texts:
    """The short way of what nearly every step brings, a token and its text: all but the text is encoded once.

    Args:
        chunk: a choice's chunk for a text.
    """

    def __init__(self, chunk: Callable[[int, str], dict[str, Any]]) -> None:
        self._chunk = chunk
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def written(self, events: Sequence[Event]) -> bytes | None:
        """The bytes of one text, with tokens before it that nobody asked for; None: the events are something else."""
        if len(events) != 2 or type(events[1]) is not Text or type(events[0]) is not Tokens:
            return None
        text = events[1]
        frame = self._frames.get(text.choice)
        if frame is None:
            frame = self._frames[text.choice] = self._frame(text.choice)
        return frame[0] + orjson.dumps(text.text) + frame[1]

    def _frame(self, choice: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text."""
        head, tail = event(self._chunk(choice, _PLACE)).split(orjson.dumps(_PLACE))
        return head, tail


_PLACE = "\x00the text\x00"
"""Stands for the text until it is known; no id or name holds this."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """One API's way to write events.

    Attributes:
        begin: chunks before the first event. feed: chunks of an event. end: bytes after the last, unless it failed.
        name: the SSE event's name for a chunk; None: it has none.
        quick: the bytes of events that came together, if there is a shorter way to them than `feed`.
    """

    begin: Callable[[], list[dict[str, Any]]]
    feed: Callable[[Event], list[dict[str, Any]]]
    end: bytes = b""
    name: Callable[[dict[str, Any]], str] | None = None
    quick: Callable[[Sequence[Event]], bytes | None] = lambda events: None

    def joined(self, events: Sequence[Event]) -> bytes:
        """Events that came together, as one piece. `Usage` is what ends all that did not fail."""
        found = self.quick(events)
        if found is not None:
            return found
        piece = b"".join([self.encoded(self.feed(event)) for event in events])
        return piece + self.end if events and isinstance(events[-1], Usage) else piece

    def encoded(self, chunks: list[dict[str, Any]]) -> bytes:
        """The chunks as bytes."""
        return b"".join(event(chunk, None if self.name is None else self.name(chunk)) for chunk in chunks)


class Beat:
    """A clock that the streams of an event loop share, one timer for all that wait for its next stroke.

    The more streams, the slower it beats, so that all their writes together take a bounded share of a processor; one
    stream alone hardly waits.

    Args:
        longest: seconds between two strokes, however many streams there are.
        per_stream: seconds that each open stream adds, until `longest` is reached.
    """

    def __init__(self, longest: float, per_stream: float = 0.0004) -> None:
        self.num_streams = 0
        self._longest, self._per_stream = longest, per_stream
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def seconds(self) -> float:
        """Between two strokes, now."""
        return min(self._longest, self.num_streams * self._per_stream)

    def stroke(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Done at the next one."""
        if not self._waiting:
            loop.call_later(self.seconds, self._strike)
        self._waiting.append(loop.create_future())
        return self._waiting[-1]

    def _strike(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Seconds of silence until a comment is sent, and that one write may take; and what sets the pace of writes."""

    keepalive: float
    write_timeout: float
    beat: Beat = field(default_factory=lambda: Beat(0.0))


class EventStream(Response):
    """Sends what is produced as it comes; ends the producer when the client goes, or stops reading.

    Args:
        produce: gets a function to write bytes with; the stream ends when it returns.
        limits: of time. head: bytes before what is produced. headers: further ones.
        place: closed when the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[Write], Coroutine[Any, Any, None]],
        limits: StreamLimits,
        *,
        head: bytes = b"",
        headers: Mapping[str, str] | None = None,
        place: ExitStack | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._produce, self._limits = produce, limits
        self._head = head
        self._place = place or ExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pipe = Pipe(scope["state"]["send_body"], self._limits)
            pipe.write(self._head)
            sender = asyncio.create_task(pipe.run())
            producer = asyncio.create_task(self._fill(pipe))
            # One that failed must not look as if it had come to its end.
            producer.add_done_callback(lambda ended: sender.cancel() if _failed(ended) else None)
            tasks = [sender, asyncio.create_task(_gone(receive)), producer]
            try:
                await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    async def _fill(self, pipe: Pipe) -> None:
        await self._produce(pipe.write)
        pipe.close()


class Pipe:
    """Bytes on their way to a client that may be slow to read; what waits goes out together.

    A write costs more than a small model takes for a token: so one that follows another closely waits for the beat, and
    takes along what comes until then. A comment is sent in silence, since proxies close a stream on which nothing
    happens while a long prompt is computed. `run` is for a task of its own: so a token wakes a short stack, not the
    whole application's.
    """

    def __init__(self, send: Send, limits: StreamLimits) -> None:
        self._send, self._limits = send, limits
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._waits: asyncio.Future[None] | None = None
        self._is_closed = self._is_sending = False
        self._last = self._loop.time()
        self._early_until = 0.0

    def write(self, piece: bytes) -> None:
        """Send this, when there is room."""
        if piece:
            self._pieces.append(piece)
            self._wake()

    def close(self) -> None:
        """Nothing more will be written."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    async def run(self) -> None:
        """Send until the pipe is closed and empty, or one write takes too long."""
        task = asyncio.current_task()
        assert task is not None
        self._watch_clock(task)
        self._limits.beat.num_streams += 1
        try:
            is_open = True
            while is_open:
                if not self._pieces and not self._is_closed:
                    self._waits = self._loop.create_future()
                    await self._waits
                if self._loop.time() < self._early_until and not self._is_closed:
                    await self._limits.beat.stroke(self._loop)
                body, is_open = b"".join(self._pieces), not self._is_closed
                self._pieces.clear()
                await self._write_out(body, more=is_open)
        finally:
            self._limits.beat.num_streams -= 1
            self._timer.cancel()

    async def _write_out(self, body: bytes, *, more: bool) -> None:
        self._is_sending, self._last = True, self._loop.time()
        self._early_until = self._last + self._limits.beat.seconds
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._is_sending = False

    def _watch_clock(self, task: asyncio.Task[Any]) -> None:
        """Now and again: comments in silence; ends the task if a write takes too long."""
        limit = self._limits.write_timeout if self._is_sending else self._limits.keepalive
        rest = self._last + limit - self._loop.time()
        if rest <= 0 and self._is_sending:
            task.cancel()
        elif rest <= 0:
            self.write(KEEP_ALIVE)
            rest = limit
        self._timer = self._loop.call_later(min(rest, self._limits.write_timeout), self._watch_clock, task)


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
