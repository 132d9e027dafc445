"""What the server tells of its engine: without a word of a prompt, at a bounded rate, and not for ever."""

import json
import threading
import time
from itertools import islice

import httpx
from quire import EngineDead
from quire_server.routes.engine import INTERVAL

LONG = {"prompt": "canary " * 30, "max_tokens": 1500, "ignore_eos": True, "stream": True}


def events(answer):
    """(name, data) of each server-sent event."""
    name = None
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
            name = None


def test_a_look_tells_of_requests_and_not_of_their_text(http, server):
    before = http.get("/engine").json()
    assert before["sequences"] == []
    assert (before["num_blocks"], before["num_running"]) == (599, 0)
    with httpx.Client(base_url=server) as other, other.stream("POST", "/v1/completions", json=LONG) as answer:
        for _ in answer.iter_lines():
            busy = http.get("/engine")
            if busy.json()["sequences"]:
                break
    (sequence,) = busy.json()["sequences"]
    assert sequence["status"] == "running"
    assert len(sequence["block_ids"]) * before["block_size"] >= sequence["num_computed_tokens"] > 0
    assert busy.json()["steps"][-1]["step_id"] > (before["steps"] or [{"step_id": -1}])[-1]["step_id"]
    assert "canary" not in busy.text


def test_a_stream_of_looks(http, server):
    with http.stream("GET", "/engine/stream") as looks:
        assert looks.headers["content-type"].startswith("text/event-stream")
        seen = events(looks)
        assert next(seen)[1]["sequences"] == []
        began = time.monotonic()
        with httpx.Client(base_url=server) as other, other.stream("POST", "/v1/completions", json=LONG):
            assert next(look for _, look in seen if look["num_running"])["sequences"]
        assert next(look for _, look in seen if not look["num_running"])["num_cached_blocks"] > 0
        list(islice(seen, 3))
        assert time.monotonic() - began >= 4 * INTERVAL  # a lower bound: at least five looks passed


def test_a_lost_engine_is_told_and_looked_for_again(serve, llm, monkeypatch):
    view, calls = llm.view, []

    async def sometimes():
        calls.append(0)
        if len(calls) == 2:
            raise EngineDead("it fell over")
        return await view()

    monkeypatch.setattr(llm, "view", sometimes)
    with serve() as (url, _, _), httpx.stream("GET", f"{url}/engine/stream") as looks:
        seen = list(islice(events(looks), 3))
    assert [name for name, _ in seen] == [None, "error", None]
    assert seen[1][1] == {"message": "it fell over"}


def test_a_reader_does_not_keep_the_server_from_leaving(serve):
    ended = threading.Event()

    def read(url):
        with httpx.stream("GET", f"{url}/engine/stream") as looks:
            for _ in looks.iter_lines():
                pass
        ended.set()

    with serve() as (url, state, listener):
        reader = threading.Thread(target=read, args=(url,))
        reader.start()
        time.sleep(2 * INTERVAL)
        assert not state.is_leaving
        listener.stop_soon()
        assert ended.wait(4)
        reader.join()
