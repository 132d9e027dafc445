"""The server over an engine in a child process: clients do not notice that it was killed."""

import asyncio
import json
import os
import signal
import time

import httpx
import pytest
from quire import AsyncLLM

BODY = {
    "max_tokens": 150,
    "ignore_eos": True,
    "stream": True,
    "temperature": 0.9,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def child():
    served = AsyncLLM(process=True, num_kv_blocks=600, dtype="float32", deterministic=True)
    yield served
    served.shutdown()


async def answers(url, kill=None):
    """The bytes' meaning of 12 streams: text, finish reason and usage of each."""
    begun = []

    async def one(client, index):
        body = BODY | {"prompt": f"Repeat: {index}", "seed": index}
        text, reason, usage, done = "", None, None, False
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                done = done or data == "[DONE]"
                if not data.startswith("{"):
                    continue
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
                begun.append(index)
        return text, reason, usage["completion_tokens"], done

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        tasks = [asyncio.create_task(one(client, index)) for index in range(12)]
        while len(set(begun)) < 12:
            await asyncio.sleep(0.005)
        if kill is not None:
            os.kill(kill, signal.SIGKILL)
        return await asyncio.gather(*tasks)


def test_streams_go_on_without_a_gap(serve, child):
    with serve(child) as (url, _, _):
        undisturbed = asyncio.run(answers(url))
        assert all((reason, count, done) == ("length", 150, True) for _, reason, count, done in undisturbed)
        old = child.engine.process_id
        assert asyncio.run(answers(url, kill=old)) == undisturbed
        assert child.engine.process_id != old


def test_clients_that_vanish_free_the_childs_blocks(serve, child):
    with serve(child) as (url, state, _):

        async def vanish():
            async with (
                httpx.AsyncClient(base_url=url) as client,
                client.stream("POST", "/v1/completions", json=BODY | {"prompt": "x", "max_tokens": 1000}) as answer,
            ):
                async for _ in answer.aiter_lines():
                    return

        async def all_vanish():
            await asyncio.gather(*(vanish() for _ in range(30)))

        asyncio.run(all_vanish())
        deadline = time.monotonic() + 5
        while (state.admission.num_requests or child.engine.kv_stats().used) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (state.admission.num_requests, child.engine.kv_stats().used) == (0, 0)


def test_health_is_told_while_there_is_no_child(serve, child):
    with serve(child) as (url, _, _):
        old = child.engine.process_id
        os.kill(old, signal.SIGKILL)
        seen = set()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            seen.add(httpx.get(f"{url}/health").status_code)
            if child.engine.process_id not in (old, None):
                break
        assert 503 in seen
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_server_whose_engine_is_dead_for_good_says_so_and_ends(serve, monkeypatch):
    llm = AsyncLLM(num_kv_blocks=50, dtype="float32")
    with serve(llm) as (url, _, listener):
        monkeypatch.setattr(llm.engine, "step", lambda: 1 / 0)
        whole = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert whole.status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503
        deadline = time.monotonic() + 10
        while not listener.should_exit and time.monotonic() < deadline:
            time.sleep(0.05)
        assert listener.should_exit
    assert "division by zero" in llm.cause_of_death
    llm.shutdown()
