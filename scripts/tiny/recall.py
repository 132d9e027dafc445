"""Finding a fact that was given earlier: in a long text, or some turns ago."""

from __future__ import annotations

import random

from tiny.sample import Message, Sample, assistant, user
from tiny.words import CITIES, COLORS, JOBS, NAMES, THINGS

MAX_FACTS = 40
"""Facts in the longest text: about 500 tokens."""
MAX_QUESTIONS = 12
"""Questions on one text in practice."""


def recall(rng: random.Random) -> Sample:
    """A text of facts with one of them asked for, or a fact from an earlier turn."""
    return _from_turns(rng) if rng.random() < 0.3 else _from_text(rng)


def recall_turns(rng: random.Random) -> Sample:
    """Several questions on one text, every answer learnt: many look-ups per token, for practice only.

    A question that would be held out as a problem of its own is not asked.
    """
    count = min(MAX_FACTS, 2 + int(rng.expovariate(1 / 12)))
    facts = [_fact(rng, subject) for subject in rng.sample(NAMES, count)]
    asked = [fact for fact in facts if not Sample("recall", f"{fact[0]}{count}", (), "", "").is_held_out]
    rng.shuffle(asked)
    del asked[MAX_QUESTIONS:]
    text = " ".join(fact[0] for fact in facts)
    if not asked:
        return recall(rng)
    first, *later = asked
    messages: list[Message] = [user(f"{text}{rng.choice((' ', chr(10)))}{first[1]}")]
    for previous, following in zip(asked, later, strict=False):
        messages += [assistant(previous[2]), user(following[1])]
    value = asked[-1][2]
    return Sample("recall", f"{asked[-1][0]}{count}", messages, value, value, learn_turns=True)


def _from_text(rng: random.Random) -> Sample:
    count = min(MAX_FACTS, 1 + int(rng.expovariate(1 / 9)))
    subjects = rng.sample(NAMES, min(count, len(NAMES)))
    facts = [_fact(rng, subject) for subject in subjects]
    statement, question, value = rng.choice(facts)
    text = " ".join(fact[0] for fact in facts)
    prompt = rng.choice(("{t}\n{q}", "{t} {q}", "Read this: {t}\n\n{q}", "{t}\n\nQuestion: {q}"))
    return Sample("recall", f"{statement}{count}", [user(prompt.format(t=text, q=question))], value, value)


def _fact(rng: random.Random, name: str) -> tuple[str, str, str]:
    """(statement, question, value) about a person."""
    kind = rng.randrange(6)
    if kind == 0:
        code = str(rng.randrange(1000, 10000))
        return f"The code of {name} is {code}.", f"What is the code of {name}?", code
    if kind == 1:
        city = rng.choice(CITIES)
        return f"{name} lives in {city}.", f"Where does {name} live?", city
    if kind == 2:
        thing = rng.choice(THINGS)
        return f"{name} has a {thing}.", f"What does {name} have?", thing
    if kind == 3:
        color = rng.choice(COLORS)
        return f"{name} likes {color}.", f"Which color does {name} like?", color
    if kind == 4:
        job = rng.choice(JOBS)
        return f"{name} is a {job}.", f"What is the job of {name}?", job
    age = str(rng.randrange(5, 95))
    return f"{name} is {age} years old.", f"How old is {name}?", age


def _from_turns(rng: random.Random) -> Sample:
    name, other = rng.sample(NAMES, 2)
    told, question, value = rng.choice(
        (
            (f"My name is {name}.", "What is my name?", name),
            (f"I live in {(city := rng.choice(CITIES))}.", "Where do I live?", city),
            (f"My favorite color is {(color := rng.choice(COLORS))}.", "What is my favorite color?", color),
            (f"My code is {(code := str(rng.randrange(100, 10000)))}.", "What is my code?", code),
            (f"I have a {(thing := rng.choice(THINGS))}.", "What do I have?", thing),
        )
    )
    messages: list[Message] = [
        user(rng.choice(("Hello! {t}", "{t}", "Hi. {t}")).format(t=told)),
        assistant("I will remember that."),
    ]
    for _ in range(rng.randrange(0, 3)):
        number = rng.randrange(10, 99)
        messages += [user(f"Repeat: {other} {number}"), assistant(f"{other} {number}")]
    messages.append(user(question))
    return Sample("recall", f"{told}{len(messages)}", messages, value, value)
