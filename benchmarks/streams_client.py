"""Reads streams of a server and does no more, so that it takes little of the processors: `server_overhead.py` runs it.

    python benchmarks/streams_client.py URL STREAMS TOKENS

For each line of its input it runs a round, and prints the two numbers of `Progress.result`. Standard library only.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field


def prompt(index: int) -> str:
    """A prompt that shares nothing with others."""
    return f"{index}: tell me about it"


@dataclass
class Progress:
    """How a round goes. Tokens are counted while all streams run: from the last one's first to the first end."""

    streams: int
    began: float = field(default_factory=time.perf_counter)
    full: float | None = None
    steady: float | None = None
    started: int = 0
    counted: int = 0

    def came(self, tokens: int, *, is_first: bool) -> None:
        """A stream has got tokens."""
        if is_first:
            self.started += 1
            if self.started == self.streams:
                self.full = time.perf_counter()
        elif self.full is not None and self.steady is None:
            self.counted += tokens

    def ended(self) -> None:
        """A stream has got all of its tokens. Raises RuntimeError if they never ran all at once."""
        if self.full is None:
            raise RuntimeError("a stream ended before all had begun; give them more tokens")
        if self.steady is None:
            self.steady = time.perf_counter() - self.full

    def result(self) -> tuple[float, float]:
        """Seconds of the round, and seconds of a token while all streams were running."""
        assert self.steady is not None
        return time.perf_counter() - self.began, self.steady / self.counted


def request(host: str, index: int, tokens: int) -> bytes:
    """A completion, streamed, on a connection of its own."""
    body = {
        "prompt": prompt(index),
        "temperature": 0.8,
        "seed": index,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode() + text


def round_(host: str, port: int, streams: int, tokens: int) -> tuple[float, float]:
    """All streams at once, to their ends."""
    progress = Progress(streams)
    waiting = selectors.DefaultSelector()
    for index in range(streams):
        connection = socket.create_connection((host, port))
        connection.sendall(request(host, index, tokens))
        waiting.register(connection, selectors.EVENT_READ, [])
    while waiting.get_map():
        for key, _ in waiting.select():
            connection, seen = key.fileobj, key.data
            data = connection.recv(65536)
            if not data:
                assert b"data: [DONE]" in b"".join(seen[-3:]), seen[-3:]
                progress.ended()
                waiting.unregister(connection)
                connection.close()
            elif count := data.count(b"data: "):
                progress.came(count, is_first=not seen)
                seen.append(data)
            elif seen:
                seen.append(data)
    return progress.result()


def main() -> None:
    """Command line."""
    url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    host, _, port = url.removeprefix("http://").partition(":")
    while sys.stdin.readline():
        print(*round_(host, int(port), streams, tokens), flush=True)


if __name__ == "__main__":
    main()
