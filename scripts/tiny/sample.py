"""What a task produces: a conversation, the answer that is right, and whether it is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HELD_OUT_EVERY = 20
"""One problem in this many never enters training."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One problem with its answer.

    Attributes:
        task: name of the task.
        key: identifies the problem whatever its wording; decides on which side of the split it lies.
        messages: the conversation, the question last.
        answer: the assistant's text, reasoning included if `thinking`.
        expected: what the answer must amount to, for the checker.
        tools: tools on offer, in OpenAI's form.
        thinking: whether worked steps were asked for.
        learn_turns: whether training also learns the earlier answers of the conversation.
    """

    task: str
    key: str
    messages: Sequence[Message]
    answer: str
    expected: str
    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)
    thinking: bool = False
    learn_turns: bool = False

    @property
    def is_held_out(self) -> bool:
        """Whether the problem belongs to the evaluation."""
        digest = hashlib.blake2b(f"{self.task}|{self.key}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) % HELD_OUT_EVERY == 0


def user(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """A system message."""
    return {"role": "system", "content": text}
