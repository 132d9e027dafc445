"""Table, JSON and plot of a run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_peers.protocol import Answer
from cpu_peers.workload import median, spread

OURS = ("quire", "quire_a16", "quire_server")
"""Forms of Quire, the default one first; all others are peers."""
PLOT = """
import json, sys
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

groups = json.load(sys.stdin)
figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 3 * len(groups)), squeeze=False)
for axis, group in zip(axes[:, 0], groups):
    peers = list(group["rows"])
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        values = [value or 0 for value in group["rows"][peer]]
        axis.bar([place + index * width for place in range(len(values))], values, width, label=peer)
    middle = 0.4 - width / 2
    axis.set_xticks([place + middle for place in range(len(group["points"]))], group["points"])
    axis.set_title(group["title"])
    axis.set_ylabel("tokens/s")
    axis.set_yscale("log")
    axis.legend()
figure.tight_layout()
figure.savefig(sys.argv[1])
"""


@dataclass(slots=True)
class Group:
    """All answers for one model in one precision.

    Attributes:
        points: in the table's order. answers: peer -> one answer per round.
    """

    model: str
    precision: str
    points: Sequence[str]
    answers: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.model}, {self.precision}"

    def values(self, peer: str, point: str) -> list[float]:
        """A figure per round in which there was one."""
        return [answer.figures[point] for answer in self.answers[peer] if point in answer.figures]

    def reason(self, peer: str, point: str) -> str | None:
        """Why there is no figure."""
        for answer in self.answers[peer]:
            if found := answer.reasons.get(point) or answer.reasons.get("all"):
                return found
        return None

    def ratio(self, ours: str, point: str) -> float | None:
        """The median of a form of Quire over the best other peer's; None if either is missing."""
        own = median(self.values(ours, point)) if ours in self.answers else None
        others = [median(self.values(peer, point)) for peer in self.answers if peer not in OURS]
        best = max((value for value in others if value is not None), default=None)
        return None if own is None or best is None else own / best


def table(group: Group) -> str:
    """The group's medians in Markdown, with the reasons for what is missing below."""
    peers, reasons = list(group.answers), {}
    ours = [peer for peer in peers if peer in OURS]
    titles = ["tokens/s", *peers, *(f"{form} / best peer" for form in ours)]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for point in group.points:
        cells = []
        for peer in peers:
            value = median(group.values(peer, point))
            cells.append("-" if value is None else f"{value:.1f}")
            if value is None and (why := group.reason(peer, point)):
                reasons.setdefault((peer, why), []).append(point)
        ratios = [group.ratio(form, point) for form in ours]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {point} | {' | '.join(cells)} |")
    notes = [
        f"* {peer}, {'all points' if len(points) == len(group.points) else ', '.join(points)}: {why}."
        for (peer, why), points in reasons.items()
    ]
    return "\n".join(
        [f"## {group.title}", "", *lines, "", *notes, *_settings(group), *_agreement(group), *_extras(group)]
    )


def _settings(group: Group) -> list[str]:
    """Each peer's versions and settings."""
    notes = {peer: next((a.notes for a in answers if a.notes), {}) for peer, answers in group.answers.items()}
    return [f"* {peer}: {json.dumps(found)[1:-1]}" for peer, found in notes.items() if found]


def _agreement(group: Group) -> list[str]:
    """How many of the first greedy tokens each peer shares with Quire: whether they compute the same model."""
    probes = {peer: answers[0].probe for peer, answers in group.answers.items() if answers and answers[0].probe}
    ours = probes.pop(OURS[0], ())
    if not ours or not probes:
        return []
    return [
        "* First greedy tokens shared with Quire, of "
        f"{len(ours)}: " + ", ".join(f"{peer} {shared(ours, theirs)}" for peer, theirs in probes.items()) + "."
    ]


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _extras(group: Group) -> list[str]:
    lines = []
    for name in sorted({name for answers in group.answers.values() for answer in answers for name in answer.extra}):
        values = {peer: [a.extra[name] for a in answers if name in a.extra] for peer, answers in group.answers.items()}
        cells = [f"{peer} {median(found):.2f}" for peer, found in values.items() if found]
        lines.append(f"* {name}: {', '.join(cells)}.")
    return lines


def markdown(run: Mapping[str, Any], groups: Iterable[Group]) -> str:
    """The whole report; `run` is the JSON's `run`."""
    machine = run["machine"]
    limits = [f"{name} {median([row[name] for row in run['limits']]):.1f}" for name in run["limits"][0]]
    lines = [
        f"# CPU peers, {run['date']}",
        "",
        f"`{run['command']}`",
        "",
        f"{machine['processor']}, {machine['cores']} logical cores, {run['threads']} threads; "
        f"medians of {run['rounds']} {run.get('of', 'rounds')}, the peers in turn.",
        f"Beside them, by torch: {', '.join(limits)}.",
    ]
    if run["busy"]:
        lines += ["", f"**The machine was busy** ({'; '.join(run['busy'])}): no figure here is worth anything."]
    return "\n".join([*lines, "", "\n\n".join(table(group) for group in groups), ""])


def record(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The groups for the JSON: every round's figures, their medians and spreads."""
    return [
        {
            "model": group.model,
            "precision": group.precision,
            "peers": {peer: _peer_record(group, peer) for peer in group.answers},
            "ratio to best peer": {
                form: {point: group.ratio(form, point) for point in group.points}
                for form in OURS
                if form in group.answers
            },
        }
        for group in groups
    ]


def _peer_record(group: Group, peer: str) -> dict[str, Any]:
    answers = group.answers[peer]
    return {
        "points": {
            point: {
                "rounds": (values := group.values(peer, point)),
                "median": median(values),
                "spread": spread(values),
                "reason": None if values else group.reason(peer, point),
            }
            for point in group.points
        },
        "notes": answers[0].notes if answers else {},
        "extra": [answer.extra for answer in answers],
        "probe": list(answers[0].probe) if answers else [],
    }


def plot(python: str, groups: Sequence[Group], target: Path) -> str | None:
    """Draw bars with matplotlib by another interpreter; returns why not, or None."""
    data = [
        {
            "title": group.title,
            "points": list(group.points),
            "rows": {peer: [median(group.values(peer, point)) for point in group.points] for peer in group.answers},
        }
        for group in groups
    ]
    done = subprocess.run(
        [python, "-c", PLOT, str(target)], input=json.dumps(data), capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
