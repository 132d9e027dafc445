"""Addition and subtraction, plain or with worked steps."""

from __future__ import annotations

import random

from tiny.sample import Sample, user

ADD_WORDINGS = (
    "What is {a}+{b}?", "What is {a} + {b}?", "{a}+{b}", "{a} + {b} =", "{a}+{b}=", "Add {a} and {b}.",
    "add {a} and {b}", "What is {a} plus {b}?", "How much is {a} + {b}?", "Calculate {a} + {b}.", "Compute {a}+{b}",
    "what is {a} + {b}", "Sum of {a} and {b}?", "{a} plus {b}", "Can you add {a} and {b}?",
)  # fmt: skip
SUB_WORDINGS = (
    "What is {a}-{b}?", "What is {a} - {b}?", "{a}-{b}", "{a} - {b} =", "{a}-{b}=", "Subtract {b} from {a}.",
    "subtract {b} from {a}", "What is {a} minus {b}?", "How much is {a} - {b}?", "Calculate {a} - {b}.",
    "Compute {a}-{b}", "what is {a} - {b}", "{a} minus {b}", "Take {b} away from {a}.",
    "Can you subtract {b} from {a}?",
)  # fmt: skip
PLACES = ("ones", "tens", "hundreds", "thousands")


def addition(rng: random.Random, digits: int, thinking: bool) -> Sample:
    """a + b for operands of up to `digits` digits."""
    a, b = _operand(rng, digits), _operand(rng, digits)
    steps = add_steps(a, b) if thinking else ""
    return _sample(f"add{digits}", rng.choice(ADD_WORDINGS), a, b, a + b, steps)


def subtraction(rng: random.Random, digits: int, thinking: bool) -> Sample:
    """a - b with a >= b."""
    b, a = sorted((_operand(rng, digits), _operand(rng, digits)))
    steps = subtract_steps(a, b) if thinking else ""
    return _sample(f"sub{digits}", rng.choice(SUB_WORDINGS), a, b, a - b, steps)


def add_steps(a: int, b: int) -> str:
    """Column addition, one line a column."""
    lines, carry, place = [], 0, 0
    while place == 0 or a or b:
        x, y = a % 10, b % 10
        total = x + y + carry
        term = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        lines.append(f"{PLACES[place]}: {term}={total}, write {total % 10}, carry {total // 10}")
        carry, a, b, place = total // 10, a // 10, b // 10, place + 1
    if carry:
        lines.append(f"{PLACES[place]}: write {carry}")
    return "\n".join(lines)


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction with borrowing, one line a column."""
    lines, borrow, place = [], 0, 0
    while place == 0 or a or b:
        x, y = a % 10, b % 10 + borrow
        owed = int(x < y)
        lines.append(f"{PLACES[place]}: {x + 10 * owed}-{y}={x + 10 * owed - y}, borrow {owed}")
        borrow, a, b, place = owed, a // 10, b // 10, place + 1
    return "\n".join(lines)


def _operand(rng: random.Random, digits: int) -> int:
    low = 10 ** (digits - 1) if rng.random() < 0.85 else 0
    return rng.randrange(low, 10**digits)


def _sample(task: str, wording: str, a: int, b: int, result: int, steps: str) -> Sample:
    answer = f"<think>\n{steps}\n</think>\n\n{result}" if steps else str(result)
    question = user(wording.format(a=a, b=b))
    return Sample(task, f"{a},{b}", [question], answer, str(result), thinking=bool(steps))
