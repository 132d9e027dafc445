"""How every peer is measured, by the same loop: requests are added, steps are taken. Standard library only."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cpu_peers.workload import NEW_TOKENS, Arrival, Point, arrivals, percentile, prompt

PROBE_PROMPT, PROBE_TOKENS = 24, 8


class Engine(Protocol):
    """A program with a model loaded, which decodes greedily and past any end token.

    Attributes:
        vocab: number of token ids. skips: kinds of points that it has no part in, and why.
    """

    vocab: int
    skips: Mapping[str, str]

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        """Queue a request for `count` tokens."""

    def step(self) -> list[tuple[str, list[int]]]:
        """Compute once; the new tokens of each request that got some."""

    def busy(self) -> bool:
        """Whether some request has not ended."""


class Measurement:
    """Measures points on one engine. Request keys are unique, and prompts are drawn from `seed`."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.extra: dict[str, float] = {}
        self._rng = random.Random(seed)
        self._seed = seed
        self._count = 0

    def probe(self, since: float) -> list[int]:
        """Greedy tokens after a prompt that is the same for every peer, round and seed.

        Notes the seconds from `since`, of `time.perf_counter`, to the first of them.
        """
        self.engine.add("probe", prompt(random.Random(0), PROBE_PROMPT, self.engine.vocab), PROBE_TOKENS)
        found: list[int] = []
        while self.engine.busy():
            before = len(found)
            found += [token for _, tokens in self.engine.step() for token in tokens]
            if found and not before:
                self.extra["first token from a cold start s"] = time.perf_counter() - since
        return found

    def measure(self, point: Point) -> float:
        """Tokens per second: of outputs for `decode` and `served`, of the prompt for `prefill`."""
        ways: dict[str, Callable[[Point], float]] = {
            "decode": self._decode,
            "prefill": self._prefill,
            "served": self._served,
        }
        return ways[point.kind](point)

    def _add(self, length: int, count: int) -> str:
        self._count += 1
        key = f"{self._seed}-{self._count}"
        self.engine.add(key, prompt(self._rng, length, self.engine.vocab), count)
        return key

    def _drain(self) -> list[list[int]]:
        deltas: list[list[int]] = []
        while self.engine.busy():
            deltas += [tokens for _, tokens in self.engine.step()]
        return deltas

    def _decode(self, point: Point) -> float:
        """From the moment when every request has its first token."""
        # The first warms up, until Quire has recorded a step of so many rows.
        for context, count in ((16, 12), (point.context, NEW_TOKENS)):
            waiting = {self._add(context, count) for _ in range(point.batch)}
            while waiting:
                waiting -= {key for key, tokens in self.engine.step() if tokens}
            begin = time.perf_counter()
            produced = sum(len(tokens) for tokens in self._drain())
            seconds = time.perf_counter() - begin
        return produced / seconds

    def _prefill(self, point: Point) -> float:
        """Of the median of three prompts: the first one pays for memory that the others find."""
        seconds = []
        for length in (16, *3 * (point.context,)):  # the first warms up
            self._add(length, 1)
            begin = time.perf_counter()
            self._drain()
            seconds.append(time.perf_counter() - begin)
        return point.context / statistics.median(seconds[1:])

    def _served(self, point: Point) -> float:
        work = arrivals(point.batch, self.engine.vocab, self._seed)
        produced, seconds, waits = serve(self.engine, work, time.perf_counter, time.sleep)
        self.extra["served first token p50 s"] = percentile(waits, 0.5)
        self.extra["served first token p99 s"] = percentile(waits, 0.99)
        return produced / seconds


def serve(
    engine: Engine, work: Sequence[Arrival], clock: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[int, float, list[float]]:
    """Run a workload in which each request is added when it arrives, between two steps.

    Returns:
        Output tokens, seconds from the start to the last token, and each request's seconds from its arrival to its
        first token.
    """
    begin, produced = clock(), 0
    waits: dict[str, float] = {}
    upcoming = list(enumerate(work))
    while upcoming or engine.busy():
        now = clock() - begin
        while upcoming and upcoming[0][1].at <= now:
            index, request = upcoming.pop(0)
            engine.add(f"served-{index}", request.prompt, request.count)
        if not engine.busy():
            sleep(max(0.0, upcoming[0][1].at - now))
            continue
        for key, tokens in engine.step():
            produced += len(tokens)
            if tokens and key not in waits:
                waits[key] = clock() - begin - work[int(key.removeprefix("served-"))].at
    return produced, clock() - begin, list(waits.values())
