"""The ASGI application over one served model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from quire import QuireError, __version__
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from quire_server.direct import Direct
from quire_server.errors import AnthropicErrorEnvelope, ApiError, ErrorEnvelope, as_api_error
from quire_server.middleware import ApiKey, BodyLimit, RequestId, answer
from quire_server.routes import anthropic, engine, openai, operations, page, responses
from quire_server.state import ServerState
from quire_server.tracing import Tracing, otlp_provider

ERRORS: Mapping[int, str] = {
    400: "Something in the request cannot be honoured.",
    401: "A key is missing or wrong.",
    404: "No such path or model.",
    405: "The path has no such method.",
    413: "The body is too large.",
    429: "The queue is full; try again later.",
    500: "The engine failed with this request.",
    503: "The engine cannot answer, or is shutting down.",
}
MAX_SHOWN = 120
"""Characters of a bad value that an error shows."""


def create_app(state: ServerState, tracer_provider: Any = None) -> FastAPI:
    """Routes, error handlers and middleware around a served model.

    Args:
        state: what the routes share.
        tracer_provider: OpenTelemetry's, which is given a span per request; None: as the settings say.

    Raises:
        OSError: a key file cannot be read. ConfigError: traces are wanted and OpenTelemetry is missing.
    """
    app = FastAPI(title="Quire", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = state
    routers = (openai.router, responses.router, operations.router, engine.router, page.router)
    for router in routers:
        app.include_router(router, responses=_errors(ErrorEnvelope))
    app.include_router(anthropic.router, responses=_errors(AnthropicErrorEnvelope))
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(QuireError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _api_error)
    # The last one added is the first to see a request.
    app.add_middleware(Direct, routers=(*routers, anthropic.router))
    app.add_middleware(BodyLimit, limit=state.settings.max_body)
    app.add_middleware(ApiKey, keys=state.settings.all_keys())
    if state.settings.cors_origins:
        origins = list(state.settings.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    if tracer_provider is None and state.settings.otlp_endpoint is not None:
        tracer_provider = otlp_provider(state.settings.otlp_endpoint)
    if tracer_provider is not None:
        app.add_middleware(Tracing, provider=tracer_provider)
    app.add_middleware(RequestId, settings=state.settings)
    return app


def _errors(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": body, "description": text} for status, text in ERRORS.items()}


def _document(app: FastAPI) -> dict[str, Any]:
    """The API's description, without the status that the framework would answer bad bodies with."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


async def _api_error(request: Request, error: Exception) -> Response:
    return answer(as_api_error(error), request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """The framework's own answers: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:MAX_SHOWN]}"
    if error.status_code == 404:
        found = ApiError(404, f"Invalid URL ({where})", code="unknown_url")
    elif error.status_code == 405:
        found = ApiError(405, f"Not allowed: {where}", code="method_not_supported", headers=_headers(error))
    else:
        found = ApiError(error.status_code, str(error.detail), headers=_headers(error))
    return answer(found, request.url.path)


def _headers(error: HTTPException) -> dict[str, str]:
    return dict(error.headers or {})


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer(_first_problem(error), request.url.path)


def _first_problem(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, by field, value and what is allowed."""
    first: Any = _most_telling(error.errors())
    kind, place = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"We could not parse the JSON body of your request. {reason}".strip())
    if not place:
        return ApiError(400, "The body must be a JSON object.", code="invalid_type")
    param = _dotted(place)
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    shown = repr(first["input"])
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    reason = first["msg"][:1].lower() + first["msg"][1:]
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"{param} is {shown}: {reason}", param=param, code=code)


def _most_telling(errors: Sequence[Any]) -> Any:
    """Of a union's errors that of the branch that came furthest."""
    return max(errors, key=lambda item: len(item["loc"]))


def _dotted(place: Sequence[Any]) -> str:
    """`messages.[0].content`, without the names of a union's branches."""
    parts = [f"[{part}]" if isinstance(part, int) else str(part) for part in place]
    return ".".join(part for part in parts if part.startswith("[") or (part.isidentifier() and part not in _BRANCHES))


_BRANCHES = frozenset({"str", "int", "TextPart", "Block", "list"})
"""What pydantic adds to a place to say which branch of a union it means."""
