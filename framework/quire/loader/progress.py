"""Progress of long work: named phases, and bytes within one. A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Protocol

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Told what loading does."""

    def phase(self, name: str, total_bytes: int = 0) -> None:
        """A new phase begins; with a total, `advance` counts towards it."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def close(self) -> None:
        """The last phase has ended."""


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total_bytes: int = 0) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def close(self) -> None:
        pass


class TerminalProgress:
    """Writes to standard error: a bar of bytes on a terminal, a line per phase elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""
        self._since = time.monotonic()

    def phase(self, name: str, total_bytes: int = 0) -> None:
        self.close()
        self._name, self._since = name, time.monotonic()
        if total_bytes and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes,
                desc=name,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(num_bytes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._name:
            logger.info("%s: %.1f s", self._name, time.monotonic() - self._since)
            self._name = ""
