"""A response of server-sent events (WHATWG HTML, section 9.2) that notices when its reader is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire_server.events import Event, Usage

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
MAY_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""What the API's description says of a path that answers whole or in events."""


def event(data: object, name: str | None = None) -> bytes:
    """One event with JSON data."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class Template:
    """Events that differ in one text only: everything else is encoded once. `chunk` makes one of a text."""

    def __init__(self, chunk: Callable[[str], dict[str, Any]]) -> None:
        self._head, self._tail = event(chunk(_PLACE)).split(orjson.dumps(_PLACE))

    def filled(self, text: str) -> bytes:
        """The event with this text."""
        return self._head + orjson.dumps(text) + self._tail


_PLACE = "\x00the text\x00"
"""Stands for the text until it is known; no id or name holds this."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """One API's way to write events.

    Attributes:
        begin: chunks before the first event. feed: chunks of an event. end: bytes after the last, unless it failed.
        name: the SSE event's name for a chunk; None: it has none.
        quick: the bytes of an event's chunks, if there is a shorter way to them than `feed`.
    """

    begin: Callable[[], list[dict[str, Any]]]
    feed: Callable[[Event], list[dict[str, Any]]]
    end: bytes = b""
    name: Callable[[dict[str, Any]], str] | None = None
    quick: Callable[[Event], bytes | None] = lambda event: None

    def joined(self, events: Sequence[Event]) -> bytes:
        """Events that came together, as one piece. `Usage` is what ends all that did not fail."""
        piece = b"".join([self.written(event) for event in events])
        return piece + self.end if events and isinstance(events[-1], Usage) else piece

    def written(self, event: Event) -> bytes:
        """An event's chunks as bytes."""
        found = self.quick(event)
        return self.encoded(self.feed(event)) if found is None else found

    def encoded(self, chunks: list[dict[str, Any]]) -> bytes:
        """The chunks as bytes."""
        return b"".join(event(chunk, None if self.name is None else self.name(chunk)) for chunk in chunks)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Seconds of silence until a comment is sent, and that one write may take."""

    keepalive: float
    write_timeout: float


class EventStream(Response, Generic[T]):
    """Sends what a generator yields as it comes; ends the generator when the client goes, or stops reading.

    A comment is sent in silence, since proxies close a stream on which nothing happens while a long
    prompt is computed. A task of its own sends, so that a token wakes a short stack, not the whole
    application's; for the same reason pieces go past the middleware (`RequestId`).

    Args:
        pieces: what is sent. encode: makes its bytes; none: nothing is written.
        limits: of time. head: bytes before the first piece. headers: further ones.
        place: closed when the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[T],
        encode: Callable[[T], bytes],
        limits: StreamLimits,
        *,
        head: bytes = b"",
        headers: Mapping[str, str] | None = None,
        place: ExitStack | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._pieces, self._encode = pieces, encode
        self._head = head
        self._place = place or ExitStack()
        self._limits = limits
        self._last = 0.0
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:  # here, since a generator that was never begun would not give it back
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            send_body = scope["state"]["send_body"]
            self._last = asyncio.get_running_loop().time()
            sender = asyncio.create_task(self._send(send_body))
            watchers = [asyncio.create_task(_gone(receive)), asyncio.create_task(self._watch_clock(send_body))]
            try:
                done, _ = await asyncio.wait([sender, *watchers], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in (sender, *watchers):
                    task.cancel()
                await asyncio.gather(sender, *watchers, return_exceptions=True)
                await self._pieces.aclose()  # for a sender that was cancelled before it began

    async def _send(self, send: Send) -> None:
        async with aclosing(self._pieces):
            if self._head:
                await self._write(send, self._head)
            async for piece in self._pieces:
                if body := self._encode(piece):
                    await self._write(send, body)
        await send({"type": "http.response.body", "more_body": False})

    async def _write(self, send: Send, body: bytes) -> None:
        self._writing, self._last = True, asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._writing = False

    async def _watch_clock(self, send: Send) -> None:
        """Comments in silence; returns if a write takes too long."""
        loop = asyncio.get_running_loop()
        while True:
            limit = self._limits.write_timeout if self._writing else self._limits.keepalive
            rest = self._last + limit - loop.time()
            if rest > 0:
                await asyncio.sleep(rest)
            elif self._writing:
                return
            else:
                await self._write(send, KEEP_ALIVE)


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
