"""Faulty output parsers and metrics sinks."""

from __future__ import annotations

import os
import time

from quire.parsers.qwen import CALL, QwenParser
from quire.plugin import MetricsSink, TextDelta, ToolCallArguments, ToolCallStart

from kit_faults.fault import Fault


class LosesTextAtBorders(QwenParser):
    """What is held back in case it begins a marker is forgotten when it does not."""

    def feed(self, text, token_ids):
        if self._held.startswith("<") and not text.startswith(("t", "/", "<")):
            self._held = ""
        return super().feed(text, token_ids)


class HoldsNothingBack(QwenParser):
    """A marker that is cut by a chunk's border comes out as text."""

    def _emit_safe(self, events):
        if self._held and self._mode.name != "CALL":
            events.append(self._delta(self._held))
            self._held = ""


class EmitsAgain(QwenParser):
    """What was held back is told by `finish`, and was told before."""

    def finish(self):
        held = self._held
        return [*super().finish(), *([TextDelta(held)] if held else [])]


class ForgetsTheEnd(QwenParser):
    def finish(self):
        return []


class StripsText(QwenParser):
    def feed(self, text, token_ids):
        return super().feed(text.strip(" ") if text.strip() else text, token_ids)


class InvalidArguments(QwenParser):
    """Arguments come out in Python's notation."""

    def feed(self, text, token_ids):
        return [
            ToolCallArguments(event.index, event.text.replace('"', "'"))
            if isinstance(event, ToolCallArguments)
            else event
            for event in super().feed(text, token_ids)
        ]


class CountsFromOne(QwenParser):
    def __init__(self, init):
        super().__init__(init)
        self._num_calls = 1


class BelievesAnyCall(QwenParser):
    """A call that is no JSON is announced all the same."""

    def _end_call(self, body, events):
        if super()._end_call(body, events):
            return True
        events[-1:] = [ToolCallStart(self._num_calls, "unknown"), ToolCallArguments(self._num_calls, body)]
        self._num_calls += 1
        return True


class DividesByZero(MetricsSink):
    def record_step(self, stats):
        self.usage = stats.kv_used_blocks / stats.kv_total_blocks


class AddsNone(MetricsSink):
    def record_step(self, stats): ...

    def record_request(self, stats):
        self.waited = stats.queue_s + stats.total_s


class Sends(MetricsSink):
    """Waits for a server in the engine's thread."""

    def record_step(self, stats):
        time.sleep(0.02)


class Opens(MetricsSink):
    """Opens its file for every line."""

    def record_step(self, stats):
        with open(os.devnull, "a") as file:
            file.write(f"{stats.num_tokens}\n")


class ClosesWhatIsNotOpen(MetricsSink):
    def record_step(self, stats):
        self.file = []

    def close(self):
        self.file.clear()


SAMPLES = {"samples": QwenParser.conformance["samples"]}
assert CALL in QwenParser.markers

FAULTS = (
    Fault("text lost at a chunk's border", "output_parser", LosesTextAtBorders, SAMPLES),
    Fault("a cut marker comes out as text", "output_parser", HoldsNothingBack, SAMPLES),
    Fault("text told twice", "output_parser", EmitsAgain, SAMPLES),
    Fault("the end is forgotten", "output_parser", ForgetsTheEnd, SAMPLES),
    Fault("white space stripped", "output_parser", StripsText, SAMPLES),
    Fault("arguments are no JSON", "output_parser", InvalidArguments, SAMPLES),
    Fault("calls counted from one", "output_parser", CountsFromOne, SAMPLES),
    Fault("a broken call is announced", "output_parser", BelievesAnyCall, SAMPLES),
    Fault("divides by an empty pool", "metrics_sink", DividesByZero),
    Fault("takes None for a number", "metrics_sink", AddsNone),
    Fault("blocks the engine", "metrics_sink", Sends),
    Fault("opens a file in every step", "metrics_sink", Opens),
    Fault("close before the first step raises", "metrics_sink", ClosesWhatIsNotOpen),
)
