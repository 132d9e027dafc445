"""Reads streams of a server at next to no price, as if it ran elsewhere: `server_overhead.py` runs it.

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

    @property
    def is_steady(self) -> bool:
        """Whether all streams are running."""
        return self.full is not None and self.steady is None

    def begun(self) -> None:
        """A stream has got its first token."""
        self.started += 1
        if self.started == self.streams:
            self.full = time.perf_counter()

    def came(self, tokens: int) -> None:
        """A stream has got more of them."""
        if self.is_steady:
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


class Stream:
    """A connection. After its first event the system wakes nobody for it, but at its end or for much at once."""

    MUCH = 1 << 15

    def __init__(self, host: str, port: int, index: int, tokens: int) -> None:
        self.connection = socket.create_connection((host, port))
        self.connection.sendall(request(host, index, tokens))
        self.connection.setblocking(False)
        self.has_begun = self.has_ended = False
        self._last = b""

    def read(self) -> int:
        """Events that are there, which are then taken."""
        count = 0
        while not self.has_ended:
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                break
            self.has_ended = not data
            self._last = (self._last + data)[-200:]
            count += data.count(b"data: ")
        if count and not self.has_begun:
            self.has_begun = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self.MUCH)
        if self.has_ended and b"data: [DONE]" not in self._last:
            raise RuntimeError(f"a stream broke off: {self._last!r}")
        return count


def round_(host: str, port: int, count: int, tokens: int) -> tuple[float, float]:
    """All streams at once, to their ends."""
    progress = Progress(count)
    waiting = selectors.DefaultSelector()
    streams = [Stream(host, port, index, tokens) for index in range(count)]
    for stream in streams:
        waiting.register(stream.connection, selectors.EVENT_READ, stream)
    while waiting.get_map():
        for key, _ in waiting.select():
            stream = key.data
            had_begun = stream.has_begun
            progress.came(stream.read())
            if stream.has_begun and not had_begun:
                progress.begun()
                if progress.is_steady:
                    for each in streams:
                        each.read()  # what came before is not counted
            if stream.has_ended:
                if progress.is_steady:
                    progress.came(sum(each.read() for each in streams))
                progress.ended()
                waiting.unregister(stream.connection)
                stream.connection.close()
    return progress.result()


def main() -> None:
    """Command line."""
    url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    host, _, port = url.removeprefix("http://").partition(":")
    while sys.stdin.readline():
        print(*round_(host, int(port), streams, tokens), flush=True)


if __name__ == "__main__":
    main()
