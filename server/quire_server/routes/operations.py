"""Routes for operators and tools: health, readiness, version, metrics, configuration, tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from quire import NOT_FINITE, EngineDead, RequestError, __version__
from starlette.responses import PlainTextResponse, Response

from quire_server.call import ignored_header
from quire_server.errors import ApiError, as_api_error, overloaded
from quire_server.jobs import chat_prompt
from quire_server.json_response import JsonResponse
from quire_server.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest
from quire_server.state import ServerState

router = APIRouter()
HEALTH_TIMEOUT = 10.0
"""Seconds within which the engine's loop must answer; a step may be under way."""


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the engine's loop answers, not only this process."""
    state: ServerState = request.app.state.server
    try:
        await state.llm.check_health(HEALTH_TIMEOUT)
    except EngineDead as error:
        raise ApiError(503, error.message, code="engine_dead") from None
    return JsonResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests are welcome."""
    state: ServerState = request.app.state.server
    if state.is_leaving:
        raise overloaded("the server is shutting down", seconds=5)
    if state.admission.is_full:
        raise overloaded("the queue is full")
    if state.faults.are_many:
        raise ApiError(
            503, f"{NOT_FINITE}, for several in a minute: the weights or the device are bad", code="not_finite"
        )
    await health(request)
    return JsonResponse({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """Quire's version."""
    return JsonResponse({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    state: ServerState = request.app.state.server
    if state.metrics is None:
        raise ApiError(404, "this server keeps no metrics")
    return PlainTextResponse(state.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """What runs: model, limits, plugins, and the configuration with the origin of each value, secrets masked."""
    state: ServerState = request.app.state.server
    info = state.llm.info
    return JsonResponse(
        {
            "version": __version__,
            "model": info.model,
            "served_names": state.names,
            "max_model_len": info.max_model_len,
            "kv_cache": {"num_blocks": info.num_kv_blocks, "block_size": info.block_size},
            "plugins": dict(info.selected),
            "config": state.config,
            "server": state.settings.shown(),
        }
    )


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a text, or of a conversation as the model sees it."""
    state: ServerState = request.app.state.server
    state.check_model(body.model)
    headers = ignored_header(body.check_extra())
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    try:
        ids = await run_in_threadpool(_token_ids, state, body)
    except RequestError as error:
        raise as_api_error(error, prompt_param="messages") from error
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": state.llm.info.max_model_len}
    if body.return_token_strs:
        answer["token_strs"] = [state.llm.tokenizer.token_text(token) for token in ids]
    return JsonResponse(answer, headers=headers)


def _token_ids(state: ServerState, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return state.llm.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    shared = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    chat = ChatRequest.of({name: getattr(body, name) for name in shared})
    return list(chat_prompt(state.llm, chat).token_ids)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Text of token ids."""
    state: ServerState = request.app.state.server
    state.check_model(body.model)
    bad = next((token for token in body.tokens if not 0 <= token < 1 << 31), None)
    if bad is not None:
        raise ApiError(400, f"tokens has {bad}; ids are not negative and below 2^31", param="tokens")
    text = state.llm.tokenizer.decode(body.tokens)
    return JsonResponse({"prompt": text}, headers=ignored_header(body.check_extra()))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What is special about the tokenizer."""
    state: ServerState = request.app.state.server
    tokenizer = state.llm.tokenizer
    special = sorted(tokenizer.special_token_ids)
    return JsonResponse(
        {
            "stop_token_ids": sorted(tokenizer.stop_token_ids),
            "special_tokens": {str(token): tokenizer.token_text(token) for token in special},
            "chat_template": tokenizer.chat_template,
        }
    )


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    """Refused: the served models generate text."""
    raise ApiError(400, "embeddings need a pooling model; the served model generates text", code="unsupported_model")
