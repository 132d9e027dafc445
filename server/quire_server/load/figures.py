"""From the times at which things happened to figures. Nothing here knows a clock, or a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from quire import ConfigError

LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end to end",
    "late": "sent late",
}
LIMITED = ("ttft", "tpot", "e2e")
"""Latencies that a request has one of, so that an objective can limit it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of one request. Times are seconds since the start of the load.

    Attributes:
        due: when it ought to have been sent. sent: when it was. ended: when its answer was whole, or it failed.
        pieces_at: when each piece of text arrived; a server sends one per token, or more rarely one for several.
        num_prompt_tokens, num_output_tokens: as the server counts them.
        error: why it failed; empty: it did not.
    """

    due: float
    sent: float
    ended: float
    pieces_at: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    def latencies(self) -> dict[str, list[float]]:
        """Seconds by name, as many as there are of each; see LATENCIES.

        `tpot` is the mean over the tokens behind the first, `itl` each gap between pieces of text.
        """
        found = {"late": [self.sent - self.due], "e2e": [self.ended - self.sent]}
        if self.pieces_at:
            first, last = self.pieces_at[0], self.pieces_at[-1]
            found["ttft"] = [first - self.sent]
            found["itl"] = [after - before for before, after in pairwise(self.pieces_at)]
            if self.num_output_tokens > 1:
                found["tpot"] = [(last - first) / (self.num_output_tokens - 1)]
        return found

    def meets(self, objectives: Mapping[str, float]) -> bool:
        """Whether it was answered, and none of its latencies exceeds its limit in seconds."""
        latencies = self.latencies()
        return not self.error and all(
            value <= limit for name, limit in objectives.items() for value in latencies.get(name, ())
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """How a latency is distributed; seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles are interpolated linearly between neighbours."""
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(float(np.mean(values)), p50, p90, p99, float(np.max(values)))


@dataclass(frozen=True, slots=True)
class Report:
    """A load's figures. Rates are per second of `duration_s`, from the start to the last answer.

    Attributes:
        num_good: requests that were answered within all objectives. errors: kind -> how many.
        spreads: latency -> distribution, over requests that were answered.
    """

    num_requests: int
    num_answered: int
    num_good: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    request_rate: float
    output_token_rate: float
    goodput: float
    objectives: dict[str, float]
    errors: dict[str, int]
    spreads: dict[str, Spread]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarize(traces: Sequence[Trace], objectives: Mapping[str, float]) -> Report:
    """The figures of a load; `objectives` are limits in seconds by latency."""
    answered = [trace for trace in traces if not trace.error]
    duration = max((trace.ended for trace in traces), default=0.0)
    good = sum(trace.meets(objectives) for trace in answered)
    output = sum(trace.num_output_tokens for trace in answered)
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for trace in answered:
        for name, found in trace.latencies().items():
            values[name] += found
    return Report(
        num_requests=len(traces),
        num_answered=len(answered),
        num_good=good,
        num_prompt_tokens=sum(trace.num_prompt_tokens for trace in answered),
        num_output_tokens=output,
        duration_s=duration,
        request_rate=_per(len(answered), duration),
        output_token_rate=_per(output, duration),
        goodput=_per(good, duration),
        objectives=dict(objectives),
        errors=dict(Counter(trace.error for trace in traces if trace.error).most_common()),
        spreads={name: Spread.of(found) for name, found in values.items() if found},
    )


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """`["ttft=200"]`, in milliseconds, as {"ttft": 0.2}. Raises ConfigError."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limit = float(value) / 1000
        except ValueError:
            limit = -1.0
        if name not in LIMITED or not 0 < limit < float("inf"):
            remedy = f"write NAME=MILLISECONDS with one of {', '.join(LIMITED)}, as in ttft=200"
            raise ConfigError(f"--slo {text!r} is not understood", remedy=remedy)
        found[name] = limit
    return found


def _per(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
