"""What the server adds to the engine's own time per token: streams over HTTP beside the same streams without it.

    python benchmarks/server_overhead.py [--streams 64] [--tokens 64 256] [--rounds 5] [--threads N] [--json FILE]

Both ways run in turn, each over an engine in a child process (`quire serve`'s default) on the bundled model. The
engine computes with --threads threads in both ways; by default with all processors, as `quire serve` does. The server
then takes turns with it; with one thread fewer it runs beside it. The clients of the HTTP streams run in a process of
their own that does no more than read, since elsewhere they have machines of their own; here they share the processors
with server and engine, so that on few of them the ratio holds their work too. What counts is the ratio of medians. A
request has its price too, which weighs more on short answers: so two lengths are measured. Beside the time that
passes stands the processor time of server and engine alone, without the clients: it can be measured on a machine that
is busy otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from figures import show
from quire import AsyncLLM, SamplingParams
from quire.commands import spare_what_stays

OPTIONS: dict[str, Any] = {"max_num_seqs": 64, "num_kv_blocks": 1200, "process": True}


def prompt(index: int) -> str:
    """A prompt that shares nothing with others."""
    return f"{index}: tell me about it"


def busy(llm: AsyncLLM) -> float:
    """Seconds of processor time that this process and the engine's have taken."""
    child = psutil.Process(llm.engine.process_id).cpu_times()
    return time.process_time() + child.user + child.system


async def direct(llm: AsyncLLM, streams: int, tokens: int) -> float:
    """Seconds until every stream has ended, through the engine's own interface."""
    began = time.perf_counter()

    async def one(index: int) -> None:
        params = SamplingParams(temperature=0.8, seed=index, max_tokens=tokens, ignore_eos=True)
        async for _ in llm.stream(prompt(index), params):
            pass

    await asyncio.gather(*(one(index) for index in range(streams)))
    return time.perf_counter() - began


CLIENT = """
import json, selectors, socket, sys, time
url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
host, port = url.removeprefix("http://").split(":")

def request(index):
    body = json.dumps({"prompt": f"{index}: tell me about it", "temperature": 0.8, "seed": index,
                       "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: {host}\\r\\nContent-Type: application/json\\r\\n"
    return head.encode() + f"Content-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n".encode() + body

def round_():
    waiting = selectors.DefaultSelector()
    for index in range(streams):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(request(index))
        waiting.register(connection, selectors.EVENT_READ, [])
    while waiting.get_map():
        for key, _ in waiting.select():
            data = key.fileobj.recv(65536)
            key.data.append(data)
            if not data:
                assert b"data: [DONE]" in b"".join(key.data[-3:]), key.data[-3:]
                waiting.unregister(key.fileobj)
                key.fileobj.close()

while sys.stdin.readline():
    began = time.perf_counter()
    round_()
    print(time.perf_counter() - began, flush=True)
"""


def serve(llm: AsyncLLM, **settings: Any) -> tuple[str, Any, threading.Thread]:
    """A server over the engine: (URL, listener, thread). `settings`: further ones of the server."""
    from quire_server.app import create_app
    from quire_server.listener import Listener, open_socket
    from quire_server.settings import ServerSettings
    from quire_server.state import ServerState

    state = ServerState(llm, ServerSettings(port=0, access_log=False, **settings))
    socket = open_socket(state.settings)
    listener = Listener(create_app(state), state)
    thread = threading.Thread(target=listener.serve_on, args=(socket,))
    spare_what_stays()  # as `quire serve` does
    thread.start()
    return f"http://127.0.0.1:{socket.getsockname()[1]}", listener, thread


def compare(llm: AsyncLLM, url: str, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    """Microseconds per token both ways and their ratio, by the clock and by processor time: medians of the rounds."""
    arguments = [sys.executable, "-c", CLIENT, url, str(streams), str(tokens)]
    alone, served = [], []
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for round_ in range(rounds + 1):
            began = busy(llm)
            client.stdin.write("go\n")
            client.stdin.flush()
            over_http = float(client.stdout.readline()), busy(llm) - began
            began = busy(llm)
            without = asyncio.run(direct(llm, streams, tokens)), busy(llm) - began
            if round_:  # the first one warms up
                alone.append(without)
                served.append(over_http)
    figures = {}
    for index, kind in enumerate(("", "busy ")):
        pair = (statistics.median(times[index] for times in way) for way in (alone, served))
        engine, server = (1e6 * seconds / streams / tokens for seconds in pair)
        figures |= {f"{kind}engine us/token": engine, f"{kind}server us/token": server, f"{kind}ratio": server / engine}
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256], help="of each stream, one length or several"
    )
    parser.add_argument("--rounds", type=int, default=5)
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=processors, help="of the engine: %(default)s")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    llm = AsyncLLM(**OPTIONS, plugin_options={"cpu_native": {"threads": given.threads}})
    url, listener, thread = serve(llm)
    figures = {}
    for tokens in given.tokens:
        found = compare(llm, url, given.streams, tokens, given.rounds)
        figures |= {f"{tokens}: {name}": value for name, value in found.items()}
    listener.should_exit = True
    thread.join()
    llm.shutdown()
    show(figures, given.json)


if __name__ == "__main__":
    main()
