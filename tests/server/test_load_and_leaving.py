"""Too many requests, too large ones, clients that go or do not read, and a server that is told to stop."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from quire import AsyncLLM, EngineDead, OutputDelta
from quire_server.settings import DrainSettings, QueueSettings

LONG = {"prompt": "go on", "max_tokens": 1500, "ignore_eos": True, "stream": True}


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_full_queue_refuses_at_once(serve):
    with serve(queue=QueueSettings(max_requests=2)) as (url, state, _), httpx.Client(base_url=url) as client:
        with client.stream("POST", "/v1/completions", json=LONG), client.stream("POST", "/v1/completions", json=LONG):
            assert state.admission.num_requests == 2
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 503
        wait_until(lambda: state.admission.num_requests == 0)
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert state.admission.refused == {"requests": 1, "tokens": 0, "draining": 0}


def test_prompt_tokens_are_limited_too_but_one_request_always_fits(serve):
    with serve(queue=QueueSettings(max_tokens=5)) as (url, _, _), httpx.Client(base_url=url) as client:
        big = {"prompt": "one two three four five six seven", "max_tokens": 1}
        assert client.post("/v1/completions", json=big).status_code == 200
        with client.stream("POST", "/v1/completions", json=LONG):
            assert client.post("/v1/completions", json=big).status_code == 429


def test_bodies_that_are_too_large(serve):
    with serve(max_body=2000) as (url, _, _), httpx.Client(base_url=url) as client:
        declared = client.post("/v1/completions", json={"prompt": "x" * 3000})

        def pieces():
            yield b'{"prompt": "'
            for _ in range(30):
                yield b"x" * 100

        undeclared = client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        for answer in (declared, undeclared):
            assert answer.status_code == 413
            assert "2000 bytes" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request(serve, llm, stream):
    with serve() as (url, state, _):

        async def vanish():
            async with httpx.AsyncClient(base_url=url, timeout=0.5) as client:
                await client.post("/v1/completions", json=LONG | {"stream": stream})

        async def all_vanish():
            await asyncio.gather(*(vanish() for _ in range(20)), return_exceptions=True)

        if stream:

            async def vanish():
                post = ("POST", "/v1/completions")
                async with httpx.AsyncClient(base_url=url) as client, client.stream(*post, json=LONG) as answer:
                    async for _ in answer.aiter_lines():
                        return

        asyncio.run(all_vanish())
        wait_until(lambda: state.admission.num_requests == 0, 3)
        wait_until(lambda: not llm.engine.has_work(), 3)
        assert llm.engine.kv_stats().used == 0


def test_a_client_that_does_not_read_is_given_up(serve, llm, monkeypatch):
    async def flood(submission, take):
        for _ in range(300):
            take(OutputDelta(submission.request_id, text="x" * 100_000, token_ids=(5,)))
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    monkeypatch.setattr(llm, "run", flood)
    body = json.dumps(LONG).encode()
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    with serve(write_timeout=0.5) as (url, state, _), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        client.sendall(head.encode() + body)
        wait_until(lambda: state.admission.num_requests == 1)
        wait_until(lambda: state.admission.num_requests == 0)


def test_silence_is_filled_with_comments(serve, llm, monkeypatch):
    run = llm.run

    async def late(submission, take):
        await asyncio.sleep(0.5)
        await run(submission, take)

    monkeypatch.setattr(llm, "run", late)
    with serve(sse_keepalive=0.1) as (url, _, _):
        lines = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "stream": True}).text.split("\n\n")
    assert lines.count(": keep-alive") >= 3
    assert lines[-2] == "data: [DONE]"


def test_requests_that_take_too_long_end_with_an_error(serve):
    with serve(request_timeout=0.3) as (url, _, _):
        whole = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False})
        assert whole.status_code == 503
        assert "took too long" in whole.json()["error"]["message"]
        events = httpx.post(f"{url}/v1/completions", json=LONG).text.strip().split("\n\n")
    assert "took too long" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]


def test_a_failing_engine_is_told_in_the_stream_without_done(serve, llm, monkeypatch):
    run = llm.run

    async def dying(submission, take):
        def last(delta):
            take(delta)
            raise EngineDead("the engine has ended: test")

        await run(submission, last)

    monkeypatch.setattr(llm, "run", dying)
    with serve() as (url, _, _):
        text = httpx.post(
            f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "stream": True}
        ).text
        whole = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    error = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "[DONE]" not in text
    assert whole.status_code == 503


@pytest.mark.parametrize("timeout", [30.0, 0.3])
def test_stopping_refuses_then_waits_then_ends(serve, timeout):
    """Running requests finish; what has not by the drain time is told so. Needs an engine of its own."""
    llm = AsyncLLM(num_kv_blocks=300, dtype="float32")
    body = {"prompt": "go on", "max_tokens": 60 if timeout == 30.0 else 1900, "ignore_eos": True, "stream": True}
    with serve(llm, drain=DrainSettings(timeout=timeout)) as (url, state, listener):
        got = []
        reader = threading.Thread(
            target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).text)
        )
        reader.start()
        wait_until(lambda: state.admission.num_requests == 1)
        listener.stop_soon()
        wait_until(lambda: state.admission.is_draining)
        with httpx.Client(base_url=url) as client:
            assert client.get("/ready").status_code == 503
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
        reader.join()
    if timeout == 30.0:
        assert got[0].strip().endswith("data: [DONE]")
    else:
        assert "error" in json.loads(got[0].strip().split("\n\n")[-1].removeprefix("data: "))
    llm.shutdown()
