"""Anthropic's API: messages, and counting their tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire_server import sse
from quire_server.anthropic_protocol import CountRequest, MessagesRequest
from quire_server.call import Call
from quire_server.jobs import chat_job, chat_prompt
from quire_server.json_response import JsonResponse
from quire_server.message_encoder import MessageEvents, whole_message
from quire_server.state import ServerState

router = APIRouter()


@router.post("/v1/messages", responses=sse.MAY_STREAM)
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation."""
    state: ServerState = request.app.state.server
    call = Call(state, request, "msg_", body.model, _ignored(body))
    chat = body.as_chat()
    job = await call.prepare(lambda: chat_job(state.llm, state.settings, chat, call.sender), "messages")
    encoder = MessageEvents(call.meta, job.num_prompt_tokens)
    if body.stream:
        return call.stream(job, sse.Encoder(encoder.begin, encoder.feed, name=lambda chunk: chunk["type"]))
    chunks = encoder.begin()
    for event in await call.events(job):
        chunks += encoder.feed(event)
    return call.answer(whole_message(chunks))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountRequest) -> Response:
    """How many tokens a conversation has."""
    state: ServerState = request.app.state.server
    call = Call(state, request, "msg_", body.model, _ignored(body))
    prompt = await call.prepare(lambda: chat_prompt(state.llm, body.as_chat()), "messages")
    return JsonResponse({"input_tokens": len(prompt.token_ids)})


def _ignored(body: CountRequest) -> tuple[str, ...]:
    """Names of fields without effect. Raises ApiError for one that cannot be honoured."""
    thinking = () if body.thinking is None else body.thinking.check_extra()
    return (*body.check_extra(), *(f"thinking.{name}" for name in thinking))
