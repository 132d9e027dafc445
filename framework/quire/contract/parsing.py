"""Output parsers: reasoning and tool calls found in the text as it is generated.

Feeding the text in any pieces must yield the same events, joined, as feeding it at once; no
character of the text is lost: each is part of one event's text or of a marker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that is the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins; `index` counts calls of this output from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the call's JSON arguments; the pieces of one index join to valid JSON."""

    index: int
    text: str


ParserEvent = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ParserInit:
    """All that a parser is constructed from, one per output.

    Attributes:
        tools: the tools that were offered, in OpenAI's form; empty: none.
        in_reasoning: True if the prompt already opened the reasoning part.
        options: the validated instance of `Provider.options`, or None.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    in_reasoning: bool = False
    options: Any = None


class OutputParser(ABC):
    """Turns one output's text into events. Its failure fails that request alone."""

    markers: ClassVar[tuple[str, ...]] = ()
    """Texts whose presence in a chat template shows that the model speaks this format; for `auto`."""

    def __init__(self, init: ParserInit) -> None:
        self.init = init

    @abstractmethod
    def feed(self, text: str, token_ids: Sequence[int]) -> list[ParserEvent]:
        """Events that this piece completes; what may be the start of a marker is held back."""

    @abstractmethod
    def finish(self) -> list[ParserEvent]:
        """What was held back. An unfinished tool call comes out as text."""
