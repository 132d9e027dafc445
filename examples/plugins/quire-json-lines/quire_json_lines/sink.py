"""Appends a line of JSON per request, and if wanted per step, to a file.

A sink is called in the engine's thread, so a slow disk must not hold it up: lines go through a bounded queue to
a thread that writes them. When the queue is full they are dropped, and the last line says how many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from quire.plugin import MetricsInit, MetricsSink, RequestStats, StepStats

QUEUED = 10_000
"""Lines that may wait for the disk."""
CLOSING_S = 10.0
"""Seconds that `close` waits for the disk."""


class JsonLinesOptions(BaseModel):
    """What stands under `plugins.options.json_lines` in the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Path("quire-metrics.jsonl")
    """The file; its folder must exist, and its lines are kept."""
    steps: bool = False
    """Whether each step gets a line too."""


class JsonLinesSink(MetricsSink):
    """Lines have `event` (request, step or dropped), `model`, `time` (seconds since the epoch), and the figures."""

    def __init__(self, init: MetricsInit) -> None:
        super().__init__(init)
        options = init.options or JsonLinesOptions()
        self._steps: bool = options.steps
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED)
        self._dropped = 0
        # Opened here, so that a path that cannot be written is an error at the start.
        self._file = open(options.path, "a", encoding="utf-8")  # noqa: SIM115
        self._writer = threading.Thread(target=self._write, name="json-lines", daemon=True)
        self._writer.start()

    def record_step(self, stats: StepStats) -> None:
        if self._steps:
            self._put("step", dataclasses.asdict(stats))

    def record_request(self, stats: RequestStats) -> None:
        self._put("request", {"time": time.time()} | dataclasses.asdict(stats))

    def close(self) -> None:
        last = [self._line("dropped", {"time": time.time(), "count": self._dropped})] if self._dropped else []
        with contextlib.suppress(queue.Full):
            for line in (*last, None):
                self._lines.put(line, timeout=CLOSING_S)
        self._writer.join(CLOSING_S)

    def _put(self, event: str, figures: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait(self._line(event, figures))
        except queue.Full:
            self._dropped += 1

    def _line(self, event: str, figures: dict[str, Any]) -> str:
        return json.dumps({"event": event, "model": self.init.model, **figures}) + "\n"

    def _write(self) -> None:
        with self._file as file:
            while (line := self._lines.get()) is not None:
                file.write(line)
                if self._lines.empty():
                    file.flush()
