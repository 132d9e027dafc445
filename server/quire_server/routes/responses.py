"""OpenAI's responses API, without storage."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire_server import sse
from quire_server.call import Call
from quire_server.jobs import chat_job
from quire_server.response_encoder import ResponseEvents
from quire_server.responses_protocol import ResponsesRequest
from quire_server.state import ServerState

router = APIRouter()


@router.post("/v1/responses", responses=sse.MAY_STREAM)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answer a conversation."""
    state: ServerState = request.app.state.server
    call = Call(state, request, "resp_", body.model, body.check_extra())
    chat = body.as_chat()
    job = await call.prepare(lambda: chat_job(state.llm, state.settings, chat, call.sender, "input"), "input")
    encoder = ResponseEvents(call.meta, body.shown())
    if body.stream:
        return call.stream(job, sse.Encoder(encoder.begin, encoder.feed, name=lambda chunk: chunk["type"]))
    chunks = encoder.begin()
    for event in await call.events(job):
        chunks = encoder.feed(event) or chunks
    return call.answer(chunks[-1]["response"])
