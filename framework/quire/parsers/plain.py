"""The parser of models that mark nothing: all text is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from quire.contract.parsing import OutputParser, ParserEvent, TextDelta


class PlainParser(OutputParser):
    """Passes text through."""

    conformance = MappingProxyType({"samples": ("<think>is text here</think>",)})

    def feed(self, text: str, token_ids: Sequence[int]) -> list[ParserEvent]:
        return [TextDelta(text)] if text else []

    def finish(self) -> list[ParserEvent]:
        return []
