"""Sends the planned requests when they are due, whatever has become of those before: an open loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx

from quire_server.client.sse_reader import SseReader
from quire_server.load.figures import Trace
from quire_server.load.plan import Planned


async def run_load(
    client: httpx.AsyncClient,
    plan: Sequence[Planned],
    concurrency: int | None = None,
    on_end: Callable[[Trace], None] = lambda trace: None,
) -> list[Trace]:
    """Send all requests; times are those of the event loop's clock.

    Args:
        client: of the server. plan: the requests.
        concurrency: so many at once at most; further ones are sent late. None: no limit.
        on_end: called with each request's trace as it ends.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    gate = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)

    async def one(request: Planned) -> Trace:
        await asyncio.sleep(request.due - (loop.time() - started))
        async with gate:
            trace = await _Attempt(request.due, lambda: loop.time() - started).send(client, request)
        on_end(trace)
        return trace

    return list(await asyncio.gather(*(one(request) for request in plan)))


@dataclass(slots=True)
class _Attempt:
    """One request under way."""

    due: float
    now: Callable[[], float]
    pieces_at: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    async def send(self, client: httpx.AsyncClient, request: Planned) -> Trace:
        sent = self.now()
        try:
            error = await self._read(client, request)
        except httpx.TimeoutException:
            error = "timeout"
        except httpx.ConnectError:
            error = "no connection"
        except httpx.TransportError:
            error = "connection lost"
        except (ValueError, KeyError, TypeError, AttributeError):
            error = "no answer of OpenAI's API"
        return Trace(
            due=self.due,
            sent=sent,
            ended=self.now(),
            pieces_at=tuple(self.pieces_at),
            num_prompt_tokens=self.usage.get("prompt_tokens", 0),
            num_output_tokens=self.usage.get("completion_tokens", 0),
            error=error,
        )

    async def _read(self, client: httpx.AsyncClient, request: Planned) -> str:
        """Read the stream to its end; returns what went wrong."""
        body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
        reader = SseReader()
        async with client.stream("POST", request.path, json=body) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            async for piece in answer.aiter_bytes():
                at = self.now()
                for data in reader.feed(piece):
                    if data == "[DONE]":
                        return ""
                    chunk = json.loads(data)
                    if chunk.get("error"):
                        return "error in the stream"
                    self._take(chunk, at)
        return "stream cut"

    def _take(self, chunk: dict[str, Any], at: float) -> None:
        self.usage = chunk.get("usage") or self.usage
        if any(_has_text(choice) for choice in chunk.get("choices") or ()):
            self.pieces_at.append(at)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    said = choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning")
    return any(said) or bool(delta.get("tool_calls"))
