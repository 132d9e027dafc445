"""What is sent, and when: arrivals and prompts, both repeatable by a seed."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quire import ConfigError

Arrivals = Literal["poisson", "constant"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
POOL_WORDS = 2000
"""Words whose tokens random prompts are drawn from."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A request: seconds after the start at which it is due, its path, its body."""

    due: float
    path: str
    body: dict[str, Any]


def arrivals(rate: float, how: Arrivals, seed: int) -> Iterator[float]:
    """Seconds at which requests are due, from 0 on and without end; an infinite rate has all at 0.

    `poisson` draws the gaps from an exponential distribution with mean 1 / rate: requests of people
    who know nothing of each other.
    """
    generator, due = random.Random(f"arrivals {seed}"), 0.0
    while True:
        yield due
        if math.isfinite(rate):
            due += generator.expovariate(rate) if how == "poisson" else 1 / rate


def random_text(seed: int) -> str:
    """Words of random letters and digits, whose tokens make a pool for `random_prompts`."""
    generator = random.Random(f"text {seed}")
    words = ("".join(generator.choices(LETTERS + "0123456789", k=generator.randint(1, 9))) for _ in range(POOL_WORDS))
    return " ".join(words)


def random_prompts(pool: Sequence[int], length: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts of `length` token ids drawn from the pool, without end; no two share a beginning but by chance."""
    generator = random.Random(f"prompts {seed}")
    while True:
        yield {"prompt": generator.choices(pool, k=length), "ignore_eos": True}


def file_prompts(file: Path) -> Iterator[dict[str, Any]]:
    """The file's prompts in order, and again from the beginning.

    A `.jsonl` file holds objects with `prompt` or `messages`, and further fields of the request if
    need be; any other holds a prompt per line.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no prompt.
    """
    try:
        # Not splitlines: JSON may hold the other characters that end lines for Python.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    is_json = file.suffix == ".jsonl"
    found = [_parsed(file, number, line) if is_json else {"prompt": line}
             for number, line in enumerate(lines, 1) if line.strip()]  # fmt: skip
    if not found:
        raise ConfigError(f"{file} holds no prompt")
    return itertools.cycle(found)


def _parsed(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file} line {number} is no JSON: {error}") from error
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise ConfigError(f"{file} line {number} is no prompt", remedy='write {"prompt": ...} or {"messages": [...]}')
    return given


def planned(prompts: Iterator[dict[str, Any]], times: Iterator[float], count: int, **more: Any) -> list[Planned]:
    """`count` requests; `more` are fields of all of them, which a prompt's own fields override."""
    return [
        Planned(due, "/v1/chat/completions" if "messages" in prompt else "/v1/completions", more | prompt)
        for due, prompt, _ in zip(times, prompts, range(count), strict=False)
    ]
