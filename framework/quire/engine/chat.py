"""From messages to a prompt, and from an answer's text to reasoning, tool calls and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from quire.contract.parsing import OutputParser, ParserEvent, ParserInit
from quire.errors import PluginError
from quire.tokenizer import Tokenizer

T = TypeVar("T")
REASONING_OPENERS = ("<think>",)
"""How a prompt ends if the template has opened the reasoning part itself."""
TAIL = 8
"""Tokens at the end of a prompt that are looked at for that."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation.

    Attributes:
        token_ids: the prompt.
        in_reasoning: the answer begins inside the reasoning part.
    """

    token_ids: Sequence[int]
    in_reasoning: bool


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How the served model is talked to. Safe to use from several threads.

    Attributes:
        tokenizer: with the chat template.
        parser: the output parser's class. options: its options.
    """

    tokenizer: Tokenizer
    parser: type[OutputParser]
    options: Any = None

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (), **arguments: Any
    ) -> ChatPrompt:
        """Render a conversation; arguments as for `Tokenizer.render_chat`. Raises RequestError."""
        ids = self.tokenizer.apply_chat_template(messages, tools=list(tools) or None, **arguments)
        tail = self.tokenizer.decode(ids[-TAIL:])
        return ChatPrompt(ids, tail.rstrip().endswith(REASONING_OPENERS))

    def new_parser(self, *, tools: Sequence[Mapping[str, Any]] = (), in_reasoning: bool = False) -> OutputParser:
        """A parser for one output. What goes wrong in it is a PluginError that names it."""
        return _Guarded(self.parser, ParserInit(tools=tools, in_reasoning=in_reasoning, options=self.options))


class _Guarded(OutputParser):
    """A parser that fails its request alone, by its name."""

    def __init__(self, parser: type[OutputParser], init: ParserInit) -> None:
        super().__init__(init)
        self._name = f"{parser.__module__}:{parser.__qualname__}"
        self._parser = self._guard(lambda: parser(init))

    def feed(self, text: str, token_ids: Sequence[int]) -> list[ParserEvent]:
        return self._guard(lambda: self._parser.feed(text, token_ids))

    def finish(self) -> list[ParserEvent]:
        return self._guard(self._parser.finish)

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            raise PluginError(
                f"the output parser {self._name} failed: {type(error).__name__}: {error}",
                remedy="choose another with --output-parser, or mend its plugin",
            ) from error
