"""Decoding of peers that are loaded side by side, a few steps of each in turn.

The memory of a virtual machine may change its speed from one second to the next, by as much as a half. Who measures
one peer for some seconds and then the next compares one speed with the other; here ratios are taken between windows of
less than a second that follow each other.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from cpu_peers.protocol import MARK, Request, Unavailable, end, launched


@dataclass(frozen=True, slots=True)
class Beside:
    """Tokens per second of each window, by peer, for a point of a model in a precision."""

    title: str
    point: str
    rates: Mapping[str, Sequence[float]]

    def ratios(self, peer: str) -> list[float]:
        """The first peer's rate over this one's, window by window."""
        ours = next(iter(self.rates.values()))
        return [mine / theirs for mine, theirs in zip(ours, self.rates[peer], strict=True)]


class Turn:
    """A peer's process, which decodes when it is asked to. Raises Unavailable with its last words if it ends."""

    def __init__(self, command: Sequence[str], request: Request, environment: Mapping[str, str], folder: Path) -> None:
        self._process = launched(command, environment, folder, stderr=subprocess.STDOUT)
        self.notes: Mapping[str, Any] = self._ask(request.write())

    def rate(self, steps: int) -> float:
        """Tokens per second of so many steps more."""
        return float(self._ask(str(steps)))

    def close(self) -> None:
        """End it."""
        end(self._process)

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last = "no word"
        with suppress(BrokenPipeError):  # what it said before it ended is the reason
            print(line, file=self._process.stdin, flush=True)
        for answer in self._process.stdout:
            _, mark, rest = answer.partition(MARK)
            if mark:
                return json.loads(rest)
            last = answer.strip() or last
        self.close()
        raise Unavailable(f"ended: {last[:300]}")


def in_turn(turns: Mapping[str, Turn], windows: int, steps: int) -> dict[str, list[float]]:
    """Rates by peer, of so many windows of so many steps; one goes first that nothing is taken from."""
    rates: dict[str, list[float]] = {peer: [] for peer in turns}
    for _ in range(windows + 1):
        for peer, turn in turns.items():
            rates[peer].append(turn.rate(steps))
    return {peer: found[1:] for peer, found in rates.items()}


def table(beside: Sequence[Beside]) -> str:
    """Medians, and the ratios' medians with their quartiles."""
    peers = list(beside[0].rates)
    lines = [
        f"| tokens/s | {' | '.join(peers)} | {' | '.join(f'{peers[0]} / {peer}' for peer in peers[1:])} |",
        f"|---|{'---:|' * (2 * len(peers) - 1)}",
    ]
    for each in beside:
        cells = [f"{median(rates):.1f}" for rates in each.rates.values()]
        for peer in peers[1:]:
            low, middle, high = quantiles(each.ratios(peer), n=4, method="inclusive")
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {each.title}, {each.point} | {' | '.join(cells)} |")
    return "\n".join(lines)
