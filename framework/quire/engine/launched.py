"""A step between its launch and the host's knowing what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from quire.contract.device import HostCopy
from quire.contract.request import RowResult, Schedule, ScheduledRow
from quire.engine.prompts import PromptFigures
from quire.sampling.pipeline import SamplingResult


@dataclass(slots=True)
class Times:
    """Where a step's seconds went; `since`: when the present part began."""

    since: float
    build: float = 0.0
    forward: float = 0.0
    sample: float = 0.0

    def lap(self) -> float:
        """Seconds since the part began; the next one begins."""
        now = time.perf_counter()
        took, self.since = now - self.since, now
        return took


@dataclass(frozen=True, slots=True)
class Running:
    """Rows that the device is working on, and the copy that brings their results."""

    rows: Sequence[ScheduledRow]
    sampled: SamplingResult | None
    prompts: dict[str, PromptFigures]
    copy: HostCopy


@dataclass(slots=True, eq=False)
class Launched:
    """A step that was launched: its rows on the device, or what came of them once the host has waited.

    `waited`: seconds that it waited for. `error`: what the step failed with, if all of its rows did.
    """

    schedule: Schedule
    times: Times
    running: Running | None = None
    results: tuple[RowResult, ...] = ()
    waited: float = 0.0
    error: Exception | None = None
