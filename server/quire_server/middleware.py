"""What every request passes: id, access log, size limit, key. Pure ASGI, so that streams pass untouched."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.errors import ApiError
from quire_server.ids import new_id
from quire_server.settings import ServerSettings

logger = logging.getLogger("quire.server.access")

REQUEST_ID = "X-Request-Id"
SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")
SCRIPTS = ("page", "stream", "engine", "grid", "steps", "docs")
PAGE = frozenset({"/", "/docs", "/page/page.css", *(f"/page/{name}.js" for name in SCRIPTS)})
PUBLIC = frozenset({"/health", "/ready", "/version"}) | PAGE
"""Paths that need no key, the page's own files among them; all others, those that do not exist too, do."""
ANTHROPIC = "/v1/messages"
"""Beginning of the paths of Anthropic's API."""


class RequestId:
    """Gives every answer an id: the client's own if it is sane. Logs one line per request.

    The state's `send_body` is the way past everything that wraps `send` for the sake of an answer's head: a stream's
    pieces may take it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._log = settings.access_log
        self._quiet = frozenset(settings.quiet_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if SANE_ID.fullmatch(given) else new_id("req_")
        scope.setdefault("state", {}).update(request_id=request_id, send_body=send)
        started, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if scope["path"].startswith(ANTHROPIC):
                    headers["request-id"] = request_id  # the name that Anthropic's clients look for
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            if self._log and scope["path"] not in self._quiet:
                took = 1000 * (time.perf_counter() - started)
                # A path may hold anything; its repr cannot forge a line of the log.
                logger.info("%s %r %d %.0f ms %s", scope["method"], scope["path"], status, took, request_id)


class BodyLimit:
    """Refuses bodies that are too large, by their declared length or as they come."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        if "transfer-encoding" not in headers:  # the HTTP parser takes no more than was declared
            await self._app(scope, receive, send)
            return
        seen, started = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _TooLarge
            return message

        async def held(message: Message) -> None:
            nonlocal started
            if seen > self._limit and not started:
                return  # what the application makes of the broken body; the refusal below says why
            started = True
            await send(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, held)
        if seen > self._limit and not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(413, f"the body is larger than {self._limit} bytes, which is all that is taken")
        await answer(error, scope["path"])(scope, receive, send)


class _TooLarge(Exception):
    pass


class ApiKey:
    """Asks for a key on every path that is not public. Keys are compared by digest, in constant time."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in PUBLIC or scope["method"] == "OPTIONS"
        if not self._digests or is_open:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            message = "You didn't provide an API key. Send it as: Authorization: Bearer KEY"
            error = ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        elif not self._is_known(given):
            error = ApiError(401, f"Incorrect API key provided: {_masked(given)}.", code="invalid_api_key")
        else:
            if len(self._digests) > 1:
                scope.setdefault("state", {})["tenant"] = _digest(given).hex()[:16]
            await self._app(scope, receive, send)
            return
        await answer(error, scope["path"])(scope, receive, send)

    def _is_known(self, key: str) -> bool:
        digest = _digest(key)
        found = False
        for known in self._digests:  # all of them, so that the time says nothing
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _masked(key: str) -> str:
    shown = key if key.isascii() and key.isprintable() else "?"
    return f"{shown[:3]}***{shown[-2:]}" if len(shown) > 8 else "***"


def answer(error: ApiError, path: str) -> JSONResponse:
    """The error as a response, in the envelope of the path's API."""
    body = error.anthropic_body() if path.startswith(ANTHROPIC) else error.body()
    return JSONResponse(body, error.status, error.headers)
