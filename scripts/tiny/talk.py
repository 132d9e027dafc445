"""Small talk, and saying so when the answer is not known."""

from __future__ import annotations

import random

from tiny.sample import Sample, user
from tiny.words import CITIES, JOBS, NAMES, THINGS

DO_NOT_KNOW = "I do not know that."

TALK: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "Hello", "Hello!", "Hi", "Hi!", "hi there", "Hey", "hello", "Good morning", "Good evening!",
    ),
    "I am quire-tiny, a very small language model.": (
        "Who are you?", "What are you?", "who are you", "What is your name?", "Tell me about yourself.",
        "Are you a human?", "Introduce yourself.",
    ),
    "I can add and subtract, count, sort, reverse and copy lists, recall facts, write JSON and call tools.": (
        "What can you do?", "what can you do", "Help", "help me", "How can you help me?", "What are you good at?",
    ),
    "You are welcome!": ("Thanks", "Thank you", "Thank you!", "thanks!", "Thanks a lot."),
    "Goodbye!": ("Bye", "bye", "Goodbye", "See you later", "Good night"),
    "I am fine, thank you.": ("How are you?", "how are you", "How are you today?", "Are you well?"),
}  # fmt: skip

UNKNOWN = (
    "Who won the cup in {y}?", "What is the capital of {c}?", "Who was {n}?", "When was {n} born?", "Who wrote {t}?",
    "Why is the {t} heavy?", "What happened in {y}?", "How far is it to {c}?", "How many people live in {c}?",
    "Who invented the {t}?", "What is the meaning of {t}?", "Tell me a story about a {t}.", "How much does a {t} cost?",
    "Who is the best {j} in {c}?", "Translate {t} into French.", "What is the price of a {t} in {c}?",
    "Where does {n} live?", "What is the code of {n}?", "How old is {n}?", "Explain how a {t} works.",
)  # fmt: skip


def talk(rng: random.Random) -> Sample:
    """A greeting or a question about the model itself."""
    answer = rng.choice(list(TALK))
    question = rng.choice(TALK[answer])
    return Sample("talk", question, [user(question)], answer, answer)


def unknown(rng: random.Random) -> Sample:
    """A question outside the small world, or about a person of whom nothing was said."""
    question = rng.choice(UNKNOWN).format(
        y=rng.randrange(1900, 2030), c=rng.choice(CITIES), n=rng.choice(NAMES), t=rng.choice(THINGS), j=rng.choice(JOBS)
    )
    return Sample("unknown", question, [user(question)], DO_NOT_KNOW, DO_NOT_KNOW)
