"""Answers that a broken model or device spoiled, as opposed to requests that were bad."""

from __future__ import annotations

import time
from collections import deque

from quire import NOT_FINITE

MOST = 3
"""Spoiled answers within `WITHIN` seconds that may be chance; more say that the weights or the device are bad."""
WITHIN = 60.0


class Faults:
    """Counts answers that ended because the model's logits were not finite."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MOST + 1)

    def note(self, message: str) -> None:
        """A request ended with this error."""
        if message == NOT_FINITE:
            self._times.append(time.monotonic())

    @property
    def are_many(self) -> bool:
        """Whether more than `MOST` fell into the last `WITHIN` seconds."""
        return len(self._times) > MOST and time.monotonic() - self._times[0] < WITHIN
