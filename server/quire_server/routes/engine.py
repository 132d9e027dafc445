"""What the engine is doing, once or as it goes on: what the page draws. No token and no text is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fastapi import APIRouter, Request
from quire import EngineError
from starlette.responses import Response

from quire_server.errors import overloaded
from quire_server.json_response import JsonResponse
from quire_server.sse import EventStream, event
from quire_server.state import ServerState

router = APIRouter()

INTERVAL = 0.2
"""Seconds between two looks; more if a look takes long."""
SHARE = 0.05
"""The most of the time that one reader's looks may take."""


@router.get("/engine")
async def engine(request: Request) -> Response:
    """Who holds which KV blocks, the queue, the last steps, and the counters."""
    state: ServerState = request.app.state.server
    try:
        view = await state.llm.view()
    except EngineError as error:
        raise overloaded(error.message) from error
    return JsonResponse(view)


@router.get("/engine/stream", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def engine_stream(request: Request) -> Response:
    """The same as server-sent events, at most five a second; `event: error` while there is no engine."""
    state: ServerState = request.app.state.server
    return EventStream(lambda write: _look(state, write), state.limits)


async def _look(state: ServerState, write: Callable[[bytes], None]) -> None:
    while not state.is_leaving and state.llm.cause_of_death is None:
        began = time.monotonic()
        try:
            seen = event(await state.llm.view())
        except EngineError as error:
            seen = event({"message": error.message}, "error")
        took = time.monotonic() - began
        write(seen)
        await asyncio.sleep(max(INTERVAL, took / SHARE))
