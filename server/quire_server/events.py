"""What a generation produces, in one form for every API. The encoders turn it into theirs.

Per choice: `Tokens`, `Text`, `Reasoning`, `ToolStart`, `ToolArguments` in the order of the output,
then one `Finish`. After the last choice one `Usage`. A failure ends everything with `Failure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import Struct
from quire import PositionLogprobs


class Prompt(Struct, frozen=True):
    """A prompt as it was understood, told once per prompt before its first output, if it was asked for.

    `logprobs` has one entry per prompt token, None for the first; empty if they were not asked for.
    """

    index: int
    token_ids: Sequence[int]
    logprobs: tuple[PositionLogprobs | None, ...] = ()


class Tokens(Struct, frozen=True):
    """Tokens of a choice, with log probabilities if they were asked for; their text follows, perhaps later.

    `num_shown`: how many of them are part of the text; the token that ends an answer is not. `alone`: no text came with
    them; it is held back, or there is none.
    """

    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] | None = None
    num_shown: int = 0
    alone: bool = False

    def joined(self, later: Tokens) -> Tokens:
        """These tokens and later ones of the same choice."""
        logprobs = None if later.logprobs is None else (self.logprobs or ()) + later.logprobs
        shown = self.num_shown + later.num_shown
        return Tokens(self.choice, self.token_ids + later.token_ids, logprobs, shown)


class Text(Struct, frozen=True):
    """Text of the answer."""

    choice: int
    text: str


class Reasoning(Struct, frozen=True):
    """Text of the model's reasoning."""

    choice: int
    text: str


class ToolStart(Struct, frozen=True):
    """A tool call begins; `index` counts the choice's calls from 0."""

    choice: int
    index: int
    call_id: str
    name: str


class ToolArguments(Struct, frozen=True):
    """A piece of a call's JSON arguments."""

    choice: int
    index: int
    text: str


class Finish(Struct, frozen=True):
    """A choice has ended: `stop`, `length` or `tool_calls`; `stop_reason` is the stop string or token, if any."""

    choice: int
    reason: str
    stop_reason: int | str | None = None


class Usage(Struct, frozen=True):
    """Tokens of the whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Failure(Struct, frozen=True):
    """Nothing more will come."""

    message: str


Event = Prompt | Tokens | Text | Reasoning | ToolStart | ToolArguments | Finish | Usage | Failure


@dataclass(slots=True)
class ToolCall:
    """A whole tool call."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Choice:
    """A whole choice."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    num_shown: int = 0
    finish: Finish | None = None


@dataclass(slots=True)
class Whole:
    """All events of a request, put together."""

    choices: list[Choice]
    prompts: dict[int, Prompt] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    failure: Failure | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Prompt():
                self.prompts[event.index] = event
            case Usage():
                self.usage = event
            case Failure():
                self.failure = event
            case _:
                self._add_to_choice(self.choices[event.choice], event)

    def _add_to_choice(
        self, choice: Choice, event: Tokens | Text | Reasoning | ToolStart | ToolArguments | Finish
    ) -> None:
        match event:
            case Tokens():
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs or ()
                choice.num_shown += event.num_shown
            case Text():
                choice.text += event.text
            case Reasoning():
                choice.reasoning += event.text
            case ToolStart():
                choice.tool_calls.append(ToolCall(event.call_id, event.name))
            case ToolArguments():
                choice.tool_calls[event.index].arguments += event.text
            case Finish():
                choice.finish = event
