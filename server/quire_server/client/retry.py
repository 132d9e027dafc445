"""How long to wait before a request is sent again: as the server says, else longer each time."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime


@dataclass(slots=True)
class Backoff:
    """Waits of one request. Seconds.

    Attributes:
        first: the first wait without advice; each further one is up to twice as long.
        longest: of one wait. A server that advises more is asked again after this.
        patience: of all waits together.
        generator: spreads waits, so that requests which were refused together do not come back together.
    """

    first: float = 0.5
    longest: float = 60.0
    patience: float = 3600.0
    generator: random.Random = field(default_factory=random.Random)
    _waits: int = 0
    _waited: float = 0.0

    def next(self, advised: float | None = None) -> float | None:
        """The next wait; None: patience has ended.

        As advised, or up to a half longer; without advice, half to all of a length that doubles.
        """
        if advised is not None:
            wait = advised * self.generator.uniform(1.0, 1.5)
        else:
            wait = self.generator.uniform(0.5, 1.0) * self.first * 2.0 ** min(self._waits, 30)
        wait = min(wait, self.longest)
        if self._waited + wait > self.patience:
            return None
        self._waits += 1
        self._waited += wait
        return wait


def advised_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a response asks to wait, from `Retry-After-Ms` or `Retry-After` (RFC 9110, 10.2.3).

    Args:
        headers: of the response; names in lower case, or a mapping that does not care.
        now: seconds since the epoch; None: the system's.

    Returns:
        None if the response does not say, or says nonsense.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if text.isascii() and text.replace(".", "", 1).isdigit():
            return float(text) / unit
    try:
        at = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, at.timestamp() - (time.time() if now is None else now))
