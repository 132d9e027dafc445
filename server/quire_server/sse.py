"""A response of server-sent events (WHATWG HTML, section 9.2) that notices when its reader is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire_server.events import Event

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


class EventStream(Response):
    """Sends chunks as they come; ends the generator when the client goes, or stops reading.

    A comment is sent in silence, since proxies close a stream on which nothing happens while a long
    prompt is computed.

    Args:
        chunks: what is sent. limits: of time. headers: further ones.
        place: closed when the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes],
        limits: StreamLimits,
        headers: Mapping[str, str] | None = None,
        place: ExitStack | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._place = place or ExitStack()
        self._limits = limits
        self._last = 0.0
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:  # here, since a generator that was never begun would not give it back
            await self._send(receive, send)

    async def _send(self, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None
        gone = False

        async def write(body: bytes, more: bool = True) -> None:
            self._writing, self._last = True, loop.time()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self._writing, self._last = False, loop.time()

        async def watch_client() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            main.cancel()

        async def watch_clock() -> None:
            nonlocal gone
            while True:
                limit = self._limits.write_timeout if self._writing else self._limits.keepalive
                rest = self._last + limit - loop.time()
                if rest > 0:
                    await asyncio.sleep(rest)
                elif self._writing:
                    gone = True
                    main.cancel()
                    return
                else:
                    await write(KEEP_ALIVE)

        self._last = loop.time()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watchers = [asyncio.create_task(watch_client()), asyncio.create_task(watch_clock())]
        try:
            async for chunk in self._chunks:
                await write(chunk)
            await write(b"", more=False)
        except asyncio.CancelledError:
            if not gone:
                raise
            main.uncancel()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await self._chunks.aclose()
