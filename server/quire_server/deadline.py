"""A time limit for a loop that waits for many small things: one timer, where a time-out around each wait costs more
than what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """Ends the wait of the task that made it; `when` is a time of the event loop."""

    def __init__(self, when: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, task.get_loop()
        self._waiting = self._passed = self._cancelled = False
        self._timer = self._loop.call_at(when, self._pass)

    def move(self, when: float) -> None:
        """Another time counts from now on."""
        self._timer.cancel()
        self._timer = self._loop.call_at(when, self._pass)

    def close(self) -> None:
        """No more time is kept."""
        self._timer.cancel()

    async def wait(self, thing: Awaitable[T]) -> T:
        """The result of `thing`. Raises TimeoutError if the time comes, or has come, before it."""
        if self._passed:
            raise TimeoutError
        before = self._task.cancelling()
        self._waiting = True
        try:
            return await thing
        except asyncio.CancelledError:
            # Somebody else may want the task to end as well: then that is what happens.
            if self._cancelled and self._task.uncancel() <= before:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = False

    def _pass(self) -> None:
        self._passed = True
        if self._waiting:
            self._cancelled = True
            self._task.cancel()
