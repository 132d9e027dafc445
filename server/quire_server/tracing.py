"""OpenTelemetry traces: one span per request, with the attributes of the conventions for generative models.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ . Needs the extra `otel`; without an endpoint nothing
of it is imported.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quire import ConfigError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.events import Event, Failure, Finish, Tokens, Usage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

TRACED = "/v1/"
"""Beginning of the paths that are traced: health checks and metrics would drown the rest."""


def otlp_provider(endpoint: str) -> TracerProvider:
    """Sends spans in batches to an OTLP collector over HTTP. Raises ConfigError if the packages are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"server.otlp_endpoint is {endpoint!r}, but OpenTelemetry is not installed ({error})",
            remedy="pip install 'quire[otel]'",
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "quire"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Middleware: begins a span, as a child of the caller's if it sends `traceparent`, and ends it with the answer."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer: Tracer = provider.get_tracer("quire.server")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent = extract(dict(Headers(scope=scope)))
        name = f"{scope['method']} {scope['path']}"
        with self._tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER) as span:
            state = scope.setdefault("state", {})
            state["trace"] = RequestTrace(span)
            span.set_attribute("http.request.method", scope["method"])
            span.set_attribute("quire.request_id", state.get("request_id", ""))

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            await self._app(scope, receive, noted)


class RequestTrace:
    """What the span is told of a generation. No prompt, no output."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began = time.perf_counter()
        self._has_token = False
        self._reasons: list[str] = []

    def begin(self, model: str, operation: str, params: Any) -> None:
        """The request was understood; `params` are its `SamplingParams`."""
        self._span.set_attributes({"gen_ai.operation.name": operation, "gen_ai.request.model": model})
        for name in ("temperature", "top_p", "max_tokens"):
            if (value := getattr(params, name)) is not None:
                self._span.set_attribute(f"gen_ai.request.{name}", value)

    def take(self, event: Event) -> None:
        """One event of the generation."""
        if isinstance(event, Tokens) and not self._has_token:
            self._has_token = True
            self._span.set_attribute("gen_ai.server.time_to_first_token", time.perf_counter() - self._began)
        elif isinstance(event, Finish):
            self._reasons.append(event.reason)
        elif isinstance(event, Usage):
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": event.prompt_tokens,
                    "gen_ai.usage.output_tokens": event.completion_tokens,
                    "gen_ai.response.finish_reasons": self._reasons,
                }
            )
        elif isinstance(event, Failure):
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, event.message))
