"""One request on its way: admitted, prepared, run, answered. The same for every API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from quire_server import sse
from quire_server.encoding import Meta
from quire_server.errors import APOLOGY, ApiError, as_api_error
from quire_server.events import Event, Failure
from quire_server.generation import Job, Tell, generate
from quire_server.ids import new_id
from quire_server.jobs import Sender
from quire_server.json_response import JsonResponse
from quire_server.state import ServerState

T = TypeVar("T")

IGNORED_FIELDS = "X-Quire-Ignored-Fields"
SMALL = 1024
"""Bytes of a body whose tokens are found sooner than another thread could take it."""
CLIENT_GONE = 499
"""Status of an answer that nobody reads; nginx's number for it, seen in the access log only."""


class Call:
    """One request on its way.

    Args:
        state: of the server. request: as it came.
        prefix: of the answer's id. model: the name that was asked for.
        ignored: names of fields that have no effect, for a header.

    Raises:
        ApiError: the server takes no request now, or the model is not served.
    """

    def __init__(
        self, state: ServerState, request: Request, prefix: str, model: str | None, ignored: Sequence[str] = ()
    ) -> None:
        self._state, self._request = state, request
        self._headers = ignored_header(ignored)
        state.admission.check()
        self.request_id = new_id(prefix)
        self.sender = Sender(self.request_id, getattr(request.state, "tenant", ""))
        self.meta = Meta(self.request_id, int(time.time()), state.check_model(model))

    async def prepare(self, make: Callable[[], T], prompt_param: str, *, is_quick: bool = False) -> T:
        """Render, tokenize and check: off the event loop, unless `is_quick` and the body is small. Raises ApiError."""
        try:
            return make() if is_quick and self._is_small() else await run_in_threadpool(make)
        except Exception as error:
            raise as_api_error(error, prompt_param=prompt_param) from error

    def _is_small(self) -> bool:
        declared = self._request.headers.get("content-length", "")
        return declared.isdigit() and int(declared) <= SMALL

    def stream(self, job: Job, encoder: sse.Encoder) -> Response:
        """Send the events as they come. Raises ApiError if there is no place for the request."""
        place = contextlib.ExitStack()
        place.enter_context(self._state.admission.admit(job.num_prompt_tokens))
        head = encoder.encoded(encoder.begin())

        async def produce(write: Callable[[bytes], None]) -> None:
            await self._generate(job, lambda events: write(encoder.joined(events)))

        return sse.EventStream(produce, self._state.limits, head=head, headers=self._headers, place=place)

    async def events(self, job: Job) -> list[Event]:
        """All events, for an answer that is sent at once. Raises ApiError if there is no place, or it fails."""
        produced: list[Event] = []
        with self._state.admission.admit(job.num_prompt_tokens):
            await _unless_disconnected(self._request, self._generate(job, produced.extend))
        if produced and isinstance(produced[-1], Failure):
            raise ApiError(503, f"{APOLOGY} {produced[-1].message}")
        return produced

    def _generate(self, job: Job, tell: Tell) -> Coroutine[Any, Any, None]:
        """Run the job, and tell the request's trace too, if there is one."""
        trace = getattr(self._request.state, "trace", None)
        if trace is not None:
            operation = "chat" if job.parsers else "text_completion"
            trace.begin(self.meta.model, operation, job.submissions[0].params)
            tell = _traced(tell, trace)
        return generate(self._state.llm, job, tell, self._state.faults.note)

    def answer(self, content: dict[str, Any]) -> Response:
        """The answer, sent at once."""
        return JsonResponse(content, headers=self._headers)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names fields without effect, if there are any."""
    return {IGNORED_FIELDS: _printable(names)} if names else {}


def _printable(names: Sequence[str]) -> str:
    """As a header may hold them: a field's name is the client's own text."""
    shown = ("".join(letter if " " <= letter <= "~" else "?" for letter in name[:64]) for name in names[:16])
    return ", ".join(shown)


def _traced(tell: Tell, trace: Any) -> Tell:
    def told(events: Sequence[Event]) -> None:
        for event in events:
            trace.take(event)
        tell(events)

    return told


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client closed the connection")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
