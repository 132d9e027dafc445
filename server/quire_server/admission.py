"""How much may wait and run at once. What is more is refused at once, so that clients can turn elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quire_server.errors import overloaded
from quire_server.settings import QueueSettings


class Admission:
    """Counts requests and their prompt tokens, in the event loop's thread."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self.num_requests = 0
        self.num_tokens = 0
        self.refused = {"requests": 0, "tokens": 0, "draining": 0}
        """How many were not taken, by the reason."""
        self.is_draining = False

    @property
    def is_full(self) -> bool:
        """Whether a further request would be refused now, whatever its size."""
        return self.num_requests >= self._settings.max_requests

    def check(self) -> None:
        """Raises ApiError if no further request is taken, whatever its size."""
        if self.is_draining:
            self.refused["draining"] += 1
            raise overloaded("the server is shutting down", seconds=5)
        if self.is_full:
            self.refused["requests"] += 1
            raise overloaded(f"{self.num_requests} requests wait or run, which is all that may", status=429)

    @contextmanager
    def admit(self, num_tokens: int) -> Iterator[None]:
        """Hold a place for one request. Raises ApiError if there is none."""
        self.check()
        # One request alone is always taken: it may be larger than the limit, but then nothing else waits.
        if self.num_requests and self.num_tokens + num_tokens > self._settings.max_tokens:
            self.refused["tokens"] += 1
            raise overloaded(f"{self.num_tokens} prompt tokens wait or run; {num_tokens} more do not fit", status=429)
        self.num_requests += 1
        self.num_tokens += num_tokens
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_tokens -= num_tokens
