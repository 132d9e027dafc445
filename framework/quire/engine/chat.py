"""From messages to a prompt, and from an answer's text to reasoning, tool calls and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.contract.parsing import OutputParser, ParserInit
from quire.tokenizer import Tokenizer

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
        """A parser for one output."""
        return self.parser(ParserInit(tools=tools, in_reasoning=in_reasoning, options=self.options))
