"""A response of server-sent events (WHATWG HTML, section 9.2) that notices when its reader is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str | None = None) -> bytes:
    """One event with JSON data."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Seconds of silence until a comment is sent, and that one write may take."""

    keepalive: float
    write_timeout: float


class EventStream(Response):
    """Sends chunks as they come; ends the generator when the client goes, or stops reading.

    A comment is sent in silence, since proxies close a stream on which nothing happens while a long
    prompt is computed.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes], limits: StreamLimits, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._limits = limits
        self._last = 0.0
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
