"""The short way of a request that is in order, past the framework's routing and its resolution of dependencies."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import get_type_hints

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from quire import QuireError
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.errors import ApiError, as_api_error
from quire_server.middleware import answer

Endpoint = Callable[[Request, BaseModel], Awaitable[Response]]


class Direct:
    """Calls the endpoints that take a request and a JSON body, and nothing else.

    The framework's way costs more than all else that this process does for a request. It keeps what it is good at: the
    API's description, and every request with something wrong. A body that does not fit goes there as it came, so that
    errors have one source.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self._app = app
        self._endpoints = dict(found for router in routers for found in _endpoints(router))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        endpoint, model = found
        messages = await _all_of(receive)

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        try:
            body = model.model_validate(json.loads(b"".join(message["body"] for message in messages)))
        except (KeyError, ValueError, RecursionError):
            await self._app(scope, again, send)
            return
        try:
            response = await endpoint(Request(scope, receive), body)
        except (ApiError, QuireError) as error:
            response = answer(as_api_error(error), scope["path"])
        await response(scope, receive, send)


def _endpoints(router: APIRouter) -> Iterable[tuple[str, tuple[Endpoint, type[BaseModel]]]]:
    """Path -> function, and the model of its body."""
    for route in router.routes:
        if isinstance(route, APIRoute) and route.methods == {"POST"}:
            hints = get_type_hints(route.endpoint)
            if set(hints) == {"request", "body", "return"}:
                yield route.path, (route.endpoint, hints["body"])


def _is_json(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _all_of(receive: Receive) -> list[Message]:
    """The messages of a body; the last one has no body if the client went away."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages
