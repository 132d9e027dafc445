"""All tasks, their shares in training, and a seeded endless stream of samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tiny.arithmetic import addition, subtraction
from tiny.lists import copying, counting, reversing, sorting
from tiny.recall import recall, recall_turns
from tiny.sample import Sample
from tiny.structured import json_object, tool_call
from tiny.talk import talk, unknown


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of problem, its share of the training samples, and whether it has held-out problems."""

    name: str
    make: Callable[[random.Random], Sample]
    share: float
    held_out: bool = True


TASKS = (
    Task("add2", lambda rng: addition(rng, 2, False), 10),
    Task("add3", lambda rng: addition(rng, 3, False), 14),
    Task("sub2", lambda rng: subtraction(rng, 2, False), 8),
    Task("sub3", lambda rng: subtraction(rng, 3, False), 12),
    Task("add2-think", lambda rng: addition(rng, 2, True), 3),
    Task("add3-think", lambda rng: addition(rng, 3, True), 4),
    Task("sub2-think", lambda rng: subtraction(rng, 2, True), 3),
    Task("sub3-think", lambda rng: subtraction(rng, 3, True), 4),
    Task("count", counting, 4),
    Task("sort", sorting, 7),
    Task("reverse", reversing, 6),
    Task("copy", copying, 8),
    Task("recall", recall, 10),
    Task("json", json_object, 5),
    Task("tool", tool_call, 7),
    Task("unknown", unknown, 3),
    Task("talk", talk, 1, held_out=False),
)


PRACTICE = (
    *(replace(task, share=task.share * 1.5) for task in TASKS if task.name != "recall"),
    Task("recall", recall, 12),
    Task("recall-turns", recall_turns, 20),
    Task("tool-or-none", lambda rng: tool_call(rng, no_tool_share=0.5), 10),
)
"""The mixture of a second stage, for what the first learns worst: looking a fact up by its subject, and not calling
a tool that is not offered. The texts of `recall-turns` are long: they make up about a third of its tokens."""


def training_stream(seed: int, tasks: Sequence[Task] = TASKS) -> Iterator[Sample]:
    """Endless samples whose problems are not held out."""
    rng = random.Random(seed)
    shares = [task.share for task in tasks]
    while True:
        task = rng.choices(tasks, shares)[0]
        sample = task.make(rng)
        if not (task.held_out and sample.is_held_out):
            yield sample


def evaluation_set(seed: int, per_task: int) -> dict[str, list[Sample]]:
    """Distinct held-out problems of each task; small talk has no held-out side and is asked as trained."""
    chosen = {}
    for task in TASKS:
        rng = random.Random(f"{seed}/{task.name}")
        found: dict[str, Sample] = {}
        for _ in range(400 * per_task):
            sample = task.make(rng)
            if sample.is_held_out or not task.held_out:
                found.setdefault(sample.key, sample)
            if len(found) == per_task:
                break
        chosen[task.name] = list(found.values())
    return chosen


def is_right(sample: Sample, text: str) -> bool:
    """Whether a reply is right: its text after any reasoning, tool-call markers taken off, is what is expected."""
    reply = text.rsplit("</think>", 1)[-1].strip()
    if sample.expected.startswith('{"name"') and sample.answer.startswith("<tool_call>"):
        reply = reply.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
    return reply == sample.expected
