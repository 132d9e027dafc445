"""Watches the child from a thread of its own: passes on what it says, and replaces it when it dies or hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from quire.errors import QuireError
from quire.remote.channel import ChannelClosed
from quire.remote.child import Child
from quire.remote.messages import Beat, ToParent

logger = logging.getLogger(__name__)

SILENCE = 10.0
"""Seconds without a sign of life after which a child is taken to hang."""
MAX_RESTARTS, WINDOW = 3, 300.0
"""A child that dies more often than this in so many seconds is not started again."""
FIRST_PAUSE = 0.2
"""Seconds before the first restart; each further one within the window waits twice as long."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Called in the supervisor's thread.

    Attributes:
        said: the child has said something. lost: it is gone, and why.
        started: another one is there. given_up: there will be none, and why.
    """

    said: Callable[[ToParent], None]
    lost: Callable[[str], None]
    started: Callable[[Child], None]
    given_up: Callable[[str], None]


class Supervisor:
    """Keeps one child alive.

    Args:
        child: one that is ready. start: makes another. step_timeout: seconds that a step may take.
        listeners: who is told.
    """

    def __init__(self, child: Child, start: Callable[[], Child], step_timeout: float, listeners: Listeners) -> None:
        self._child = child
        self._start = start
        self._step_timeout = step_timeout
        self._listeners = listeners
        self._losses: deque[float] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the child and the thread; idempotent."""
        self._stopping.set()
        self._child.stop()
        self._thread.join()

    def _run(self) -> None:
        while True:
            reason = self._watch()
            if self._stopping.is_set():
                return
            logger.error("the engine's process %s; starting another", reason)
            self._listeners.lost(reason)
            failure = self._replace(reason)
            if self._stopping.is_set():
                self._child.stop()
                return
            if failure is not None:
                self._listeners.given_up(failure)
                return
            self._listeners.started(self._child)

    def _watch(self) -> str:
        """Pass on what the child says until it is gone; how it went."""
        while True:
            try:
                message = self._child.receive(SILENCE)
            except TimeoutError:
                self._child.kill()
                return f"gave no sign of life for {SILENCE:g} s"
            except ChannelClosed:
                return self._child.exit_manner()
            if not isinstance(message, Beat):
                self._listeners.said(message)
            elif message.busy_s > self._step_timeout:
                self._child.kill()
                return f"was ended: a step took longer than {self._step_timeout:g} s (engine.step_timeout)"

    def _replace(self, reason: str) -> str | None:
        """Start another child; why not, if it cannot be."""
        while True:
            now = time.monotonic()
            self._losses.append(now)
            while self._losses[0] < now - WINDOW:
                self._losses.popleft()
            if len(self._losses) > MAX_RESTARTS:
                return f"the engine's process ended {len(self._losses)} times in {WINDOW:g} s; last it {reason}"
            if self._stopping.wait(FIRST_PAUSE * 2 ** (len(self._losses) - 1)):
                return None
            try:
                self._child = self._start()
                return None
            except QuireError as error:
                logger.error("the engine's process cannot be started: %s", error)
                reason = f"could not be started: {error.message}"
