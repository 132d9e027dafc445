"""A server as an `Engine`: a process that is asked over HTTP, a thread to each request. Standard library only."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START_TIMEOUT, READ_TIMEOUT = 600.0, 600.0
"""Seconds until a server is ready, and until more of an answer comes."""
LOOK = 0.02
"""Seconds after which a step ends in which nothing came, so that requests are sent when they are due."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked for tokens.

    Attributes:
        path: of completions. body: of prompt and count: a request for as many tokens, greedily and past any end token,
        as a stream that names token ids. tokens: those of one event.
    """

    path: str
    body: Callable[[Sequence[int], int], Mapping[str, Any]]
    tokens: Callable[[Mapping[str, Any]], Sequence[int]]


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A server's process and the requests that are under way. Whoever measures ends the process, with the worker's.

    Raises:
        RuntimeError: it ends, refuses a request, or ends an answer early; with its words.
    """

    skips: Mapping[str, str] = dict.fromkeys(("decode", "prefill"), "serves requests; its library is measured there")

    def __init__(self, command: Sequence[str], port: int, dialect: Dialect, vocab: int, log: Path) -> None:
        self.vocab = vocab
        self._port, self._dialect = port, dialect
        self._events: queue.SimpleQueue[tuple[str, Sequence[int] | Exception]] = queue.SimpleQueue()
        self._left: dict[str, int] = {}
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self._wait()

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        self._left[key] = count
        threading.Thread(target=self._ask, args=(key, prompt, count), daemon=True).start()

    def step(self) -> list[tuple[str, list[int]]]:
        """What has come; nothing if nothing comes within LOOK."""
        deltas = []
        try:
            event = self._events.get(timeout=LOOK)
            while True:
                deltas.append(self._take(*event))
                event = self._events.get_nowait()
        except queue.Empty:
            return deltas

    def busy(self) -> bool:
        return bool(self._left)

    def _take(self, key: str, found: Sequence[int] | Exception) -> tuple[str, list[int]]:
        if isinstance(found, Exception):
            raise RuntimeError(f"{key}: {found}; {self._last_words()}") from found
        self._left[key] -= len(found)
        if self._left[key] <= 0:
            del self._left[key]
        return key, list(found)

    def _ask(self, key: str, prompt: Sequence[int], count: int) -> None:
        """A request from its beginning to its end, in a thread."""
        body = json.dumps(self._dialect.body(prompt, count))
        connection = http.client.HTTPConnection(HOST, self._port, timeout=READ_TIMEOUT)
        came = 0
        try:
            connection.request("POST", self._dialect.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ConnectionError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
            for line in response:
                _, mark, event = line.partition(b"data: ")
                if not mark or event.strip() == b"[DONE]":
                    continue
                if tokens := self._dialect.tokens(json.loads(event)):
                    came += len(tokens)
                    self._events.put((key, tokens))
            if came != count:
                raise ConnectionError(f"the answer ended with {came} of {count} tokens")
        except Exception as error:
            self._events.put((key, error))
        finally:
            connection.close()

    def _wait(self) -> None:
        """Until it says that it is ready."""
        until = time.monotonic() + START_TIMEOUT
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"ended with status {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > until:
                raise RuntimeError(f"not ready after {START_TIMEOUT:.0f} s: {self._last_words()}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=READ_TIMEOUT)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        said = (line.strip(" │\n") for line in reversed(self._log.read_text(errors="replace").splitlines()))
        return next((line[:300] for line in said if any(map(str.isalnum, line))), "no word")
