"""What is measured: points, prompts, arrivals and statistics. Standard library only."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

NEW_TOKENS = 32
"""Output tokens of a request whose decoding is timed."""
SHORTEST, LONGEST = 16, 256
"""Tokens in, and tokens out, of the served workload's requests."""
ARRIVALS_PER_SECOND = 4.0
"""More than two cores can serve at these models' size, so that a queue forms and batching shows."""
ROOM = 16
"""Tokens that a request may take beyond its own."""
FIRST_TOKEN = 10
"""Ids below it are left to special tokens."""


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure, in tokens per second.

    Attributes:
        kind: `decode`, `prefill` or `served`. batch: requests at once; of `served`, requests in all.
        context: prompt tokens of each request; 0 for `served`.
    """

    kind: str
    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `decode:BATCH:CONTEXT`, `prefill:TOKENS` or `served:REQUESTS`. Raises ValueError for other text."""
        kind, *numbers = text.split(":")
        sizes = [int(number) for number in numbers]
        if any(size < 1 for size in sizes):
            raise ValueError(f"sizes of a point are at least 1, not {text!r}")
        match kind, sizes:
            case "decode", [batch, context]:
                return cls(kind, batch, context)
            case "prefill", [context]:
                return cls(kind, 1, context)
            case "served", [requests]:
                return cls(kind, requests, 0)
        raise ValueError(f"a point is decode:BATCH:CONTEXT, prefill:TOKENS or served:REQUESTS, not {text!r}")

    def __str__(self) -> str:
        match self.kind:
            case "decode":
                return f"decode:{self.batch}:{self.context}"
            case "prefill":
                return f"prefill:{self.context}"
            case _:
                return f"served:{self.batch}"


ALL_POINTS = (
    *(Point("decode", batch, context) for context in (64, 2048) for batch in (1, 8, 32)),
    Point("prefill", 1, 512),
    Point("served", 64, 0),
)
QUICK_POINTS = (Point("decode", 1, 64), Point("decode", 8, 64), Point("prefill", 1, 512))


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine must hold: `sequences` at once, each of at most `length` tokens, and of `tokens` together."""

    sequences: int
    length: int
    tokens: int


def capacity(points: Iterable[Point]) -> Capacity:
    """What the points need. All requests of a served workload may run at once: not every peer can be held to fewer."""
    sequences, longest, tokens = 1, LONGEST, LONGEST
    for point in points:
        length = (2 * LONGEST if point.kind == "served" else point.context + NEW_TOKENS) + ROOM
        sequences, longest = max(sequences, point.batch), max(longest, length)
        tokens = max(tokens, point.batch * length)
    return Capacity(sequences, longest, tokens)


def parts(points: Sequence[str]) -> list[list[str]]:
    """Points that share an engine: a served workload has its own, which holds many short requests."""
    together = [point for point in points if Point.parse(point).kind != "served"]
    alone = [[point] for point in points if point not in together]
    return ([together] if together else []) + alone


def prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Random token ids, which share nothing with other prompts."""
    return [rng.randrange(FIRST_TOKEN, vocab) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the served workload: at `at` seconds comes `prompt`, to be answered by `count` tokens."""

    at: float
    prompt: Sequence[int]
    count: int


def arrivals(requests: int, vocab: int, seed: int, rate: float = ARRIVALS_PER_SECOND) -> list[Arrival]:
    """Requests of mixed lengths at the times of a Poisson process of `rate` per second, in order of time."""
    rng = random.Random(seed)
    at, result = 0.0, []
    for _ in range(requests):
        at += rng.expovariate(rate)
        length, count = rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST)
        result.append(Arrival(at, prompt(rng, length, vocab), count))
    return result


def median(values: Sequence[float]) -> float | None:
    """Median, or None of nothing."""
    return statistics.median(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median; None for fewer than two values."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, by nearest rank. Raises ValueError for no values."""
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
