"""How a request's deltas reach whoever asked for them, within one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from quire.errors import RequestError
from quire.outputs import OutputDelta

Take = Callable[[OutputDelta], None]


class Stream:
    """One request's way to whoever takes its deltas, within one event loop.

    Attributes:
        ended: done with the last delta, or with why there will be none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Take) -> None:
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self._take = take

    def put(self, delta: OutputDelta) -> None:
        if self.ended.done():
            return
        try:
            self._take(delta)
        except Exception as error:
            self.ended.set_exception(error)
        else:
            if delta.finished:
                self.ended.set_result(None)

    def refuse(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def close(self) -> bool:
        """Take no more; whether the request may still run."""
        if self.ended.cancel() or self.ended.cancelled():
            return True
        error = self.ended.exception()
        return error is not None and not isinstance(error, RequestError)


class Reader:
    """Keeps deltas for one reader, at a fraction of `asyncio.Queue`'s price."""

    def __init__(self) -> None:
        self._deltas: deque[OutputDelta] = deque()
        self._waits: asyncio.Future[None] | None = None

    def put(self, delta: OutputDelta) -> None:
        self._deltas.append(delta)
        self.wake()

    def wake(self, *ended: object) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    async def get(self, ended: asyncio.Future[None]) -> OutputDelta:
        """The next delta; once none are left, what `ended` raises."""
        while not self._deltas:
            if ended.done():
                ended.result()
            self._waits = ended.get_loop().create_future()
            await self._waits
        return self._deltas.popleft()


def hand_over(batch: Iterable[tuple[Stream, OutputDelta]]) -> None:
    """In the event loop: all that a step made, each to its stream."""
    for stream, delta in batch:
        stream.put(delta)
