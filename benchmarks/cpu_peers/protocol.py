"""The benchmark asks a worker by one JSON request, and gets one JSON answer. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

MARK = "cpu-peers-answer: "
"""Begins the line of the answer: native libraries print to the standard output too."""
PRECISIONS = ("bf16", "int4")
TIMEOUT = 3600.0
"""Seconds that a worker may take."""


class Unavailable(Exception):
    """A peer cannot do what was asked; the message is the reason, for the table."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is to do.

    Attributes:
        action: `prepare` (convert the checkpoint) or `measure`. checkpoint: folder in transformers' form.
        folder: where the peer keeps its conversions. precision: one of PRECISIONS.
        points: see `Point.parse`. threads: how many to compute with. seed: of the prompts.
    """

    action: str
    checkpoint: str
    folder: str
    precision: str
    points: Sequence[str] = ()
    threads: int = 1
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> Self:
        """From JSON. Raises ValueError for an action or a precision that there is not."""
        request = cls(**json.loads(text))
        if request.action not in ("prepare", "measure"):
            raise ValueError(f"action is prepare or measure, not {request.action!r}")
        if request.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {request.precision!r}")
        return request

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it.

    Attributes:
        figures: point -> tokens per second. reasons: point, or `all`, -> why there is no figure.
        notes: versions and settings, in the peer's own words. extra: other figures, with units in the name.
        probe: first greedy tokens after a fixed prompt, by which peers can be compared.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    probe: Sequence[int] = ()

    def write(self) -> str:
        """As the line that `find` looks for."""
        return MARK + json.dumps(asdict(self))

    @classmethod
    def find(cls, output: str) -> Self | None:
        """The answer in a worker's standard output, or None."""
        for line in reversed(output.splitlines()):
            _, mark, rest = line.partition(MARK)
            if mark:
                return cls(**json.loads(rest))
        return None


def joined(answers: Sequence[tuple[Sequence[str], Answer]]) -> Answer:
    """One answer of several that were given for some points each; versions, load time and probe are the first's."""
    figures: dict[str, float] = {}
    reasons: dict[str, str] = {}
    extra: dict[str, float] = {}
    for points, answer in answers:
        figures |= answer.figures
        reasons |= dict.fromkeys(points, answer.reasons["all"]) if "all" in answer.reasons else answer.reasons
        extra = {**answer.extra, **extra}
    first = answers[0][1]
    return Answer(figures, reasons, first.notes, extra, first.probe)


def ask(command: Sequence[str], request: Request, environment: Mapping[str, str], folder: Path) -> Answer:
    """Run a worker in `folder`, and return its answer; a worker that dies answers with its last words."""
    process = launched(command, environment, folder, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(request.write(), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Answer(reasons={"all": f"took longer than {TIMEOUT:.0f} s"})
    finally:
        end(process)
    answer = Answer.find(output)
    if answer is not None:
        return answer
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word")
    return Answer(reasons={"all": f"ended with status {process.returncode}: {last[:300]}"})


def launched(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, stderr: int
) -> subprocess.Popen[str]:
    """A worker's process, spoken with by text, for `end`."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        env=dict(environment),
        cwd=folder,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a worker, and the server that it may have started and would leave behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
