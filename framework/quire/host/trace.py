"""Tells each step of discovery, hooks and selection with its time: what `--trace-plugins` shows.

The steps go to the log `quire.trace` at level debug, where a program that embeds Quire can listen as well.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

logger = logging.getLogger("quire.trace")


class Step:
    """Times what runs within it and tells how it ended: `result`, or the exception.

    Args:
        what: the step, such as "import plugin 'x'".
    """

    def __init__(self, what: str) -> None:
        self.result = "done"
        self._what = what
        self._started = 0.0

    def __enter__(self) -> Step:
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            ended = self.result if error is None else f"{type(error).__name__}: {error}"
            logger.debug("%s: %s [%.1f ms]", self._what, ended, 1e3 * (time.perf_counter() - self._started))
