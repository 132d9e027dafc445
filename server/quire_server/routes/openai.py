"""OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire_server import sse
from quire_server.call import Call
from quire_server.chat_encoder import ChatChunks, whole_chat
from quire_server.completion_encoder import CompletionChunks, whole_completion
from quire_server.encoding import Wants
from quire_server.events import Usage
from quire_server.fields import SamplingFields
from quire_server.generation import whole
from quire_server.jobs import chat_job, completion_job, only_echo
from quire_server.json_response import JsonResponse
from quire_server.protocol import ChatRequest, CompletionRequest
from quire_server.state import ServerState

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The served names."""
    state: ServerState = request.app.state.server
    return JsonResponse({"object": "list", "data": [_model(state, name) for name in state.names]})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One served name."""
    state: ServerState = request.app.state.server
    return JsonResponse(_model(state, state.check_model(name)))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    info = state.llm.info
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "quire",
        "root": info.model,
        "max_model_len": info.max_model_len,
    }


@router.post("/v1/chat/completions", responses=sse.MAY_STREAM)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    state: ServerState = request.app.state.server
    call = _call(state, request, body, "chatcmpl-")
    job = await call.prepare(lambda: chat_job(state.llm, state.settings, body, call.sender), "messages")
    wants = _wants(body, body.top_logprobs or 0 if body.logprobs else None)
    if body.stream:
        chunks = ChatChunks(call.meta, wants, job.num_choices, job.num_prompt_tokens)
        return call.stream(job, sse.Encoder(chunks.begin, chunks.feed, end=sse.DONE, quick=chunks.quick))
    return call.answer(whole_chat(call.meta, wants, whole(job, await call.events(job))))


@router.post("/v1/completions", responses=sse.MAY_STREAM)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one prompt or several."""
    state: ServerState = request.app.state.server
    call = _call(state, request, body, "cmpl-")
    one_text = isinstance(body.prompt, str)
    job = await call.prepare(
        lambda: completion_job(state.llm, state.settings, body, call.sender), "prompt", is_quick=one_text
    )
    tokenizer, submissions = state.llm.tokenizer, job.submissions
    wants = _wants(body, body.logprobs)
    chunks = CompletionChunks(
        call.meta,
        wants,
        submissions[0].params.n,
        len(submissions),
        job.num_prompt_tokens,
        echo=(lambda index: _echo(body, tokenizer.decode, submissions[index].prompt_token_ids)) if body.echo else None,
        only_echo=only_echo(body),
        token_text=tokenizer.token_text,
    )
    if body.stream:
        return call.stream(job, sse.Encoder(list, chunks.feed, end=sse.DONE, quick=chunks.quick))
    collected: list[dict[str, Any]] = []
    usage = Usage()
    for event in await call.events(job):
        usage = event if isinstance(event, Usage) else usage
        collected += [chunk for chunk in chunks.feed(event) if chunk["choices"]]
    shown = Usage(usage.prompt_tokens, 0, usage.cached_tokens) if only_echo(body) else usage
    return call.answer(whole_completion(collected, shown))


def _echo(body: CompletionRequest, decode: Callable[..., str], token_ids: Sequence[int]) -> str:
    """The prompt's text: as it was sent, or of its ids where it was cut or sent as such."""
    if isinstance(body.prompt, str) and body.truncate_prompt_tokens is None:
        return body.prompt
    return decode(token_ids, skip_special_tokens=True)


def _call(state: ServerState, request: Request, body: SamplingFields, prefix: str) -> Call:
    body.check_stream_options()
    return Call(state, request, prefix, body.model, body.check_extra())


def _wants(body: SamplingFields, logprobs: int | None) -> Wants:
    options = body.stream_options
    running = bool(options and options.continuous_usage_stats)
    return Wants(
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        usage=running or bool(options and options.include_usage),
        running_usage=running,
        prompt_logprobs=body.prompt_logprobs is not None,
    )
