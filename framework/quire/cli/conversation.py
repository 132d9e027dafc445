"""A conversation at the terminal: its turns, its answers, and how they are written. Who answers is left open."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.cli.console import note
from quire.contract.parsing import ParserEvent, ReasoningDelta, TextDelta, ToolCallStart
from quire.params import SamplingParams

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that steer a terminal: a model's text must not move the cursor or ring the bell."""


@dataclass(slots=True)
class Answer:
    """What came of one question. Times are seconds."""

    text: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    def summary(self) -> str:
        """One line of figures."""
        decode = self.total_s - self.first_token_s
        speed = (self.num_output_tokens - 1) / decode if self.num_output_tokens > 1 and decode > 0 else 0.0
        return (
            f"{self.num_prompt_tokens} tokens in ({self.num_cached_tokens} cached), {self.num_output_tokens} out; "
            f"first after {self.first_token_s:.2f} s, then {speed:.1f} tokens/s; ended by {self.finish_reason}"
        )


@dataclass(kw_only=True)
class Conversation(ABC):
    """The turns so far, and how the next one is asked.

    Attributes:
        params: sampling of the next answer.
        system: system message. think: whether to ask for reasoning; None: as the template does.
        stats: write a line of figures after each answer.
        messages: the turns so far, without the system message.
        last: the last answer.
    """

    params: SamplingParams
    system: str | None = None
    think: bool | None = None
    stats: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: Answer | None = None
    _line_open: bool = False

    @abstractmethod
    def answer(self, messages: Sequence[dict[str, Any]]) -> Answer:
        """Write the answer to these turns to stdout; the last is the user's.

        Interrupting stops the answer, whose `finish_reason` is then `abort`.

        Raises:
            RequestError: the turns cannot be answered. EngineError: the answer failed.
        """

    def figures(self) -> list[str]:
        """Lines about who answers, beside those about the last answer."""
        return []

    def set_params(self, params: SamplingParams) -> None:
        """Replace the sampling. Raises RequestError if whoever answers cannot honour it."""
        self.params = params

    @property
    def remembers(self) -> bool:
        """Whether answered turns are kept."""
        return True

    def ask(self, text: str) -> Answer:
        """Answer one message, and keep what there is of the answer. On an error the turns stay as they were.

        Raises:
            RequestError, EngineError: as `answer` does.
        """
        turn = {"role": "user", "content": text}
        answer = self.answer([*self.messages, turn])
        if self.remembers:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        self.last = answer
        self._line_open = bool(answer.text) and not answer.text.endswith("\n")
        if self.stats:
            self.finish_line()
            note(answer.summary())
        return answer

    def with_system(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns behind the system message, if there is one."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *messages]

    def finish_line(self) -> None:
        """End the answer's line on stdout, unless it has ended."""
        if self._line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._line_open = False

    def reset(self) -> None:
        """Forget the turns."""
        self.messages.clear()
        self.last = None


class Writer:
    """Writes events: answers to stdout; reasoning dimmed, to stderr if stdout is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._reasoned = False

    def write(self, events: Sequence[ParserEvent]) -> str:
        """Write, and return what was part of the answer."""
        answer = ""
        for event in events:
            if isinstance(event, ReasoningDelta):
                self._reason(event.text)
                continue
            text = event.text if isinstance(event, TextDelta) else ""
            if not isinstance(event, TextDelta):
                text = f"\n[tool call] {event.name} " if isinstance(event, ToolCallStart) else event.text
            self._separate()
            sys.stdout.write(shown(text) if self._terminal else text)
            answer += text
        sys.stdout.flush()
        return answer

    def end(self) -> None:
        """End a reasoning that no answer followed."""
        self._separate()

    def _reason(self, text: str) -> None:
        stream = sys.stdout if self._terminal else sys.stderr
        stream.write(f"{DIM}{shown(text)}{PLAIN}" if stream.isatty() else text)
        stream.flush()
        self._reasoned = True

    def _separate(self) -> None:
        if self._reasoned:
            stream = sys.stdout if self._terminal else sys.stderr
            stream.write("\n")
            stream.flush()
            self._reasoned = False


def shown(text: str) -> str:
    """The text as a terminal may have it, control characters replaced."""
    return text.translate(CONTROLS)
