"""OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from quire import AsyncLLM
from starlette.responses import Response

from quire_server import sse
from quire_server.chat_encoder import ChatChunks, failure, whole_chat
from quire_server.completion_encoder import CompletionChunks, whole_completion
from quire_server.encoding import Meta, Wants
from quire_server.errors import ApiError, as_api_error
from quire_server.events import Event, Failure, Usage
from quire_server.fields import SamplingFields
from quire_server.generation import Job, events, whole
from quire_server.jobs import chat_job, completion_job, only_echo
from quire_server.json_response import JsonResponse
from quire_server.protocol import ChatRequest, CompletionRequest
from quire_server.state import ServerState

router = APIRouter()
IGNORED_FIELDS = "X-Quire-Ignored-Fields"


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


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    state: ServerState = request.app.state.server
    call = _Call(state, request, body, "chatcmpl")
    job = await call.prepare(lambda: chat_job(state.llm, state.settings, body, call.request_id), "messages")
    wants = call.wants(body.top_logprobs or 0 if body.logprobs else None)
    if body.stream:
        chunks = ChatChunks(call.meta, wants, job.num_choices, job.num_prompt_tokens)
        return call.stream(job, chunks.begin, chunks.feed)
    return await call.whole(job, lambda found: whole_chat(call.meta, wants, found))


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one prompt or several."""
    state: ServerState = request.app.state.server
    call = _Call(state, request, body, "cmpl")
    job = await call.prepare(lambda: completion_job(state.llm, state.settings, body, call.request_id), "prompt")
    tokenizer, submissions = state.llm.tokenizer, job.submissions
    wants = call.wants(body.logprobs)
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
        return call.stream(job, list, chunks.feed)
    collected: list[dict[str, Any]] = []
    usage = Usage()
    async for event in call.events(job):
        if isinstance(event, Failure):
            raise ApiError(503, failure(event)["error"]["message"])
        usage = event if isinstance(event, Usage) else usage
        collected += [chunk for chunk in chunks.feed(event) if chunk["choices"]]
    shown = Usage(usage.prompt_tokens, 0, usage.cached_tokens) if only_echo(body) else usage
    return call.answer(whole_completion(collected, shown))


def _echo(body: CompletionRequest, decode: Callable[..., str], token_ids: Sequence[int]) -> str:
    """The prompt's text: as it was sent, or of its ids where it was cut or sent as such."""
    if isinstance(body.prompt, str) and body.truncate_prompt_tokens is None:
        return body.prompt
    return decode(token_ids, skip_special_tokens=True)


class _Call:
    """One request on its way."""

    def __init__(self, state: ServerState, request: Request, body: SamplingFields, prefix: str) -> None:
        self._state, self._request, self._body = state, request, body
        body.check_stream_options()
        ignored = body.check_extra()
        self._headers = {IGNORED_FIELDS: ", ".join(name[:64] for name in ignored[:16])} if ignored else {}
        state.admission.check()
        self.request_id = f"{prefix}-{uuid.uuid4().hex}"
        self.meta = Meta(self.request_id, int(time.time()), state.check_model(body.model))

    def wants(self, logprobs: int | None) -> Wants:
        options = self._body.stream_options
        running = bool(options and options.continuous_usage_stats)
        return Wants(
            logprobs=logprobs,
            token_ids=bool(self._body.return_token_ids),
            usage=running or bool(options and options.include_usage),
            running_usage=running,
            prompt_logprobs=self._body.prompt_logprobs is not None,
        )

    async def prepare(self, make: Callable[[], Job], prompt_param: str) -> Job:
        """Render, tokenize and check, off the event loop. Raises ApiError."""
        try:
            return await run_in_threadpool(make)
        except Exception as error:
            raise as_api_error(error, prompt_param=prompt_param) from error

    def stream(
        self,
        job: Job,
        begin: Callable[[], list[dict[str, Any]]],
        feed: Callable[[Event], list[dict[str, Any]]],
    ) -> Response:
        """Send what `feed` makes of the events as they come."""
        place = contextlib.ExitStack()
        place.enter_context(self._state.admission.admit(job.num_prompt_tokens))
        chunks = _encoded(self._state.llm, job, begin, feed, place)
        return sse.EventStream(chunks, self._state.limits, self._headers)

    async def whole(self, job: Job, encode: Callable[[Any], dict[str, Any]]) -> Response:
        """Send everything at once."""
        with self._state.admission.admit(job.num_prompt_tokens):
            found = await unless_disconnected(self._request, whole(self._state.llm, job))
        if found.failure is not None:
            raise ApiError(503, failure(found.failure)["error"]["message"])
        return self.answer(encode(found))

    async def events(self, job: Job) -> AsyncGenerator[Event]:
        """The events of a request that does not stream."""
        with self._state.admission.admit(job.num_prompt_tokens):
            for event in await unless_disconnected(self._request, _all(self._state.llm, job)):
                yield event

    def answer(self, content: dict[str, Any]) -> Response:
        return JsonResponse(content, headers=self._headers)


async def _all(llm: AsyncLLM, job: Job) -> list[Event]:
    async with contextlib.aclosing(events(llm, job)) as stream:
        return [event async for event in stream]


async def _encoded(
    llm: AsyncLLM,
    job: Job,
    begin: Callable[[], list[dict[str, Any]]],
    feed: Callable[[Event], list[dict[str, Any]]],
    place: contextlib.ExitStack,
) -> AsyncGenerator[bytes]:
    """The stream's bytes; gives the place back at the end."""
    with place:
        for chunk in begin():
            yield sse.event(chunk)
        async with contextlib.aclosing(events(llm, job)) as stream:
            async for event in stream:
                for chunk in feed(event):
                    yield sse.event(chunk)
                if isinstance(event, Failure):
                    return
        yield sse.DONE


async def unless_disconnected(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
