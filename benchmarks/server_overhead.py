"""What the server adds to the engine's own time per token: streams over HTTP beside the same streams without it.

    python benchmarks/server_overhead.py [--streams 64] [--tokens 64 256] [--rounds 15] [--threads N] [--json FILE]

Both ways run in turn, each over an engine in a child process (`quire serve`'s default) on the bundled model. Three
clocks are read. The first tells the time per token while all streams are running: from the first token of the last one
to the first one's end. `whole` divides a round's time by its tokens: there the price of taking requests is in, which
come all at once, and weighs more on short answers; so two lengths are measured. `busy` is the processor time of server
and engine alone, without the clients: it can be measured on a machine that is busy otherwise. What counts is the
median of the rounds' ratios: each is of two measurements that follow each other, since a machine's speed drifts.

The engine computes with --threads threads in both ways; by default with all processors, as `quire serve` does. The
server then takes turns with it; with one thread fewer it runs beside it. The clients of the HTTP streams are a process
that sleeps while streams run and reads what has come at the end, since elsewhere they have machines of their own.
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
from streams_client import Progress, prompt

OPTIONS: dict[str, Any] = {"max_num_seqs": 64, "num_kv_blocks": 1200, "process": True}


def busy(llm: AsyncLLM) -> float:
    """Seconds of processor time that this process and the engine's have taken."""
    child = psutil.Process(llm.engine.process_id).cpu_times()
    return time.process_time() + child.user + child.system


async def direct(llm: AsyncLLM, streams: int, tokens: int) -> tuple[float, float]:
    """As `Progress.result`, through the engine's own interface."""
    progress = Progress(streams)

    async def one(index: int) -> None:
        params = SamplingParams(temperature=0.8, seed=index, max_tokens=tokens, ignore_eos=True)
        has_begun = False
        async for delta in llm.stream(prompt(index), params):
            if has_begun:
                progress.came(len(delta.token_ids))
            else:
                has_begun = True
                progress.begun()
        progress.ended()

    await asyncio.gather(*(one(index) for index in range(streams)))
    return progress.result()


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
    """Microseconds per token both ways and the rounds' ratios, by three clocks: medians."""
    client_path = Path(__file__).with_name("streams_client.py")
    arguments = [sys.executable, str(client_path), url, str(streams), str(tokens)]
    alone, served = [], []
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for round_ in range(rounds + 1):
            began = busy(llm)
            client.stdin.write("go\n")
            client.stdin.flush()
            whole, steady = map(float, client.stdout.readline().split())
            over_http = steady, whole / streams / tokens, (busy(llm) - began) / streams / tokens
            began = busy(llm)
            whole, steady = asyncio.run(direct(llm, streams, tokens))
            without = steady, whole / streams / tokens, (busy(llm) - began) / streams / tokens
            if round_:  # the first one warms up
                alone.append(without)
                served.append(over_http)
    figures = {}
    for index, kind in enumerate(("", "whole ", "busy ")):
        engine, server = (1e6 * statistics.median(times[index] for times in way) for way in (alone, served))
        ratio = statistics.median(http[index] / plain[index] for http, plain in zip(served, alone, strict=True))
        figures |= {f"{kind}engine us/token": engine, f"{kind}server us/token": server, f"{kind}ratio": ratio}
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256], help="of each stream, one length or several"
    )
    parser.add_argument("--rounds", type=int, default=15)
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
