"""Traces: a span per request, joined to the caller's, with numbers and without texts."""

import threading
import time

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from quire import ConfigError
from quire_server.app import create_app
from quire_server.listener import Listener, open_socket
from quire_server.settings import ServerSettings
from quire_server.state import ServerState
from quire_server.tracing import otlp_provider

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traced(llm):
    """(client, exporter) of a server that traces into memory."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    state = ServerState(llm, ServerSettings(port=0))
    socket = open_socket(state.settings)
    listener = Listener(create_app(state, provider), state)
    thread = threading.Thread(target=listener.serve_on, args=(socket,))
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{socket.getsockname()[1]}", timeout=30) as client:
        yield client, exporter
    listener.should_exit = True
    thread.join()
    socket.close()


def spans(exporter, count):
    deadline = time.monotonic() + 5
    while len(exporter.get_finished_spans()) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return exporter.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_was_asked_and_what_it_cost(traced, stream):
    client, exporter = traced
    body = {"messages": [{"role": "user", "content": "canary"}], "temperature": 0.5, "max_tokens": 3, "stream": stream}
    client.post("/v1/chat/completions", json=body | {"ignore_eos": True}, headers={"traceparent": PARENT}).read()
    (span,) = spans(exporter, 1)
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    found = dict(span.attributes)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "quire-tiny"
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.max_tokens"]) == (0.5, 3)
    assert found["gen_ai.usage.output_tokens"] == 3
    assert found["gen_ai.usage.input_tokens"] > 3
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert 0 < found["gen_ai.server.time_to_first_token"] < (span.end_time - span.start_time) / 1e9
    assert (found["http.response.status_code"], span.status.status_code) == (200, StatusCode.UNSET)
    assert "canary" not in span.to_json()


def test_errors_are_seen_and_health_is_not_traced(traced, llm, monkeypatch):
    client, exporter = traced
    client.get("/health")
    client.post("/v1/completions", json={"prompt": 3.5})
    (bad,) = spans(exporter, 1)
    assert bad.attributes["http.response.status_code"] == 400

    async def broken(submission, take):
        raise RuntimeError("a parser, say")

    monkeypatch.setattr(llm, "run", broken)
    failed = client.post("/v1/completions", json={"prompt": "x"})
    assert (failed.status_code, "RuntimeError" in failed.json()["error"]["message"]) == (503, True)
    assert spans(exporter, 2)[1].status.status_code is StatusCode.ERROR


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        otlp_provider("http://localhost:4318/v1/traces")
    assert caught.value.remedy == "pip install 'quire[otel]'"
