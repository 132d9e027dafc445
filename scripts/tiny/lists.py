"""Counting, sorting, reversing and copying."""

from __future__ import annotations

import random
import string

from tiny.sample import Sample, user
from tiny.words import COLORS, NAMES, THINGS

SEPARATORS = (", ", ", ", ", ", " ", "; ")
SORT_WORDINGS = ("Sort these numbers: {x}", "Sort: {x}", "sort {x}", "Put in order: {x}", "Sort the list {x}",
                 "Sort from small to large: {x}", "Can you sort {x}?")  # fmt: skip
REVERSE_WORDINGS = ("Reverse this list: {x}", "Reverse: {x}", "reverse {x}", "Write backwards: {x}",
                    "Reverse the order of {x}", "Can you reverse {x}?")  # fmt: skip
COPY_WORDINGS = ("Repeat: {x}", "Copy this: {x}", "Say: {x}", "Repeat after me: {x}", "Write exactly: {x}",
                 "copy {x}", "Please repeat: {x}", "Echo: {x}")  # fmt: skip
COUNT_WORDINGS = ("Count from {a} to {b}.", "count from {a} to {b}", "Count up from {a} to {b}",
                  "List the numbers from {a} to {b}.", "Can you count from {a} to {b}?")  # fmt: skip
HOW_MANY_WORDINGS = ("How many items are in this list: {x}?", "How many words: {x}?", "Count the items: {x}",
                     "How many things are there: {x}?")  # fmt: skip


def counting(rng: random.Random) -> Sample:
    """Count upwards, or count the items of a list."""
    if rng.random() < 0.5:
        start = rng.randrange(0, 90)
        end = start + rng.randrange(2, 12)
        answer = ", ".join(map(str, range(start, end + 1)))
        question = rng.choice(COUNT_WORDINGS).format(a=start, b=end)
        return Sample("count", f"{start}-{end}", [user(question)], answer, answer)
    items = _items(rng, rng.randrange(2, 10))
    question = rng.choice(HOW_MANY_WORDINGS).format(x=", ".join(items))
    return Sample("count", ",".join(items), [user(question)], str(len(items)), str(len(items)))


def sorting(rng: random.Random) -> Sample:
    """Sort three to six numbers."""
    limit = rng.choice((10, 100, 100))
    numbers = [rng.randrange(limit) for _ in range(rng.randrange(3, 7))]
    separator = rng.choice(SEPARATORS)
    answer = separator.join(map(str, sorted(numbers)))
    question = rng.choice(SORT_WORDINGS).format(x=separator.join(map(str, numbers)))
    return Sample("sort", ",".join(map(str, numbers)), [user(question)], answer, answer)


def reversing(rng: random.Random) -> Sample:
    """Reverse three to six items."""
    items = _items(rng, rng.randrange(3, 7))
    separator = rng.choice(SEPARATORS)
    answer = separator.join(reversed(items))
    question = rng.choice(REVERSE_WORDINGS).format(x=separator.join(items))
    return Sample("reverse", ",".join(items), [user(question)], answer, answer)


def copying(rng: random.Random) -> Sample:
    """Repeat words, numbers, or letters that mean nothing."""
    kind = rng.random()
    if kind < 0.4:
        text = " ".join(_items(rng, rng.randrange(1, 8)))
    elif kind < 0.7:
        text = "".join(rng.choice(string.digits) for _ in range(rng.randrange(3, 12)))
    else:
        text = " ".join(_gibberish(rng) for _ in range(rng.randrange(1, 4)))
    return Sample("copy", text, [user(rng.choice(COPY_WORDINGS).format(x=text))], text, text)


def _items(rng: random.Random, count: int) -> list[str]:
    kind = rng.random()
    if kind < 0.35:
        return [str(rng.randrange(100)) for _ in range(count)]
    pool = rng.choice((THINGS, NAMES, COLORS)) if kind < 0.8 else list(string.ascii_letters)
    return [rng.choice(pool) for _ in range(count)]


def _gibberish(rng: random.Random) -> str:
    alphabet = string.ascii_lowercase + string.digits
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(3, 9)))
