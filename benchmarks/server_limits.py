"""How fast a full server says so, and how fast it forgets clients that vanish.

    python benchmarks/server_limits.py [--streams 64] [--refusals 200] [--clients 200] [--json FILE]

A server over an engine in a child process (`quire serve`'s default) on the bundled model. First its queue is filled
with streams, and further requests are sent one after the other: what counts is the time until the 429. Then clients
open streams, wait until all that can run run, and close their connections at once: what counts is the time until the
KV pool and the queue are as they were before.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from figures import show
from quire import AsyncLLM
from server_overhead import serve

BODY = {"prompt": "tell me about it", "max_tokens": 1500, "ignore_eos": True, "stream": True}
PATIENCE = 60.0
"""Seconds after which something will not happen any more."""


def opened(address: tuple[str, int]) -> socket.socket:
    """A connection on which a request has been sent."""
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(address)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    return connection


def standing(llm: AsyncLLM) -> tuple[int, int, int]:
    """Sequences that run, that wait, and blocks that they own."""
    queues = llm.engine.scheduler_stats()
    return queues.num_running, queues.num_waiting, llm.engine.kv_stats().used


def wait_for(what: str, happened: Any) -> float:
    """Seconds until it happened. Raises TimeoutError."""
    began = time.perf_counter()
    while not happened():
        if time.perf_counter() - began > PATIENCE:
            raise TimeoutError(what)
        time.sleep(0.005)
    return time.perf_counter() - began


def refusals(address: tuple[str, int], count: int) -> list[float]:
    """Seconds of each refusal, connection and all."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        with opened(address) as connection:
            answer = connection.recv(65536)
        times.append(time.perf_counter() - began)
        assert b" 429 " in answer.split(b"\r\n", 1)[0], answer
        assert b"retry-after:" in answer.lower(), answer
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="sequences that run at once")
    parser.add_argument("--refusals", type=int, default=200)
    parser.add_argument("--clients", type=int, default=200, help="clients that vanish; so many requests fill the queue")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    llm = AsyncLLM(max_num_seqs=given.streams, num_kv_blocks=4000, process=True)
    url, listener, thread = serve(llm, queue={"max_requests": given.clients})
    host, _, port = url.removeprefix("http://").partition(":")
    address = host, int(port)
    before = standing(llm)
    clients = [opened(address) for _ in range(given.clients)]
    wait_for("no full batch", lambda: standing(llm)[:2] == (given.streams, given.clients - given.streams))
    times = sorted(refusals(address, given.refusals))
    running = standing(llm)
    for client in clients:
        client.close()
    vanished = wait_for("blocks are still owned", lambda: standing(llm) == before)
    listener.should_exit = True
    thread.join()
    llm.shutdown()
    figures = {
        "429 median ms": 1e3 * statistics.median(times),
        "429 p99 ms": 1e3 * times[int(0.99 * (len(times) - 1))],
        "blocks owned": running[2],
        "vanished s": vanished,
    }
    show(figures, given.json)


if __name__ == "__main__":
    main()
