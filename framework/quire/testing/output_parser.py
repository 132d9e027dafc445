"""Conformance of output parsers: any chunking gives the same events, no text is lost, arguments are JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.contract.parsing import (
    OutputParser,
    ParserEvent,
    ParserInit,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)

Joined = list[tuple[str, ...]]


def join(events: Sequence[ParserEvent]) -> Joined:
    """Events with neighbouring pieces of one kind put together, so that chunkings can be compared."""
    joined: Joined = []
    for event in events:
        if isinstance(event, ToolCallStart):
            joined.append(("call", str(event.index), event.name))
            continue
        kind = {TextDelta: "text", ReasoningDelta: "reasoning", ToolCallArguments: "arguments"}[type(event)]
        index = str(event.index) if isinstance(event, ToolCallArguments) else ""
        if joined and joined[-1][:2] == (kind, index):
            joined[-1] = (kind, index, joined[-1][2] + event.text)
        else:
            joined.append((kind, index, event.text))
    return joined


def parse(parser: OutputParser, pieces: Sequence[str]) -> list[ParserEvent]:
    """All events of a text that arrives in these pieces."""
    events = [event for piece in pieces for event in parser.feed(piece, ())]
    return events + parser.finish()


def strict_json(text: str) -> object:
    """The value of a JSON text; NaN and the infinities, which Python's reader lets pass, are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON: {text!r}")

    return json.loads(text, parse_constant=refuse)


class OutputParserConformance:
    """What every parser must hold. Subclass, give `parser_class`, and samples in the model's format."""

    samples: Sequence[str] = ()
    """Outputs as the model writes them: reasoning, calls, broken ones."""

    @pytest.fixture
    def parser_class(self) -> type[OutputParser]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `parser_class`")

    def test_any_chunking_is_one_shot(self, parser_class: type[OutputParser]) -> None:
        """Samples and mixtures of their fragments, cut anywhere, give the events of the whole.

        If it fails: hold back what may be the beginning of a marker until it is one or is not, and the white space that
        belongs to it.
        """
        fragments = [*parser_class.markers, *self.samples, "a", " ", "\n", "<", "{}", "é"]

        @given(parts=st.lists(st.sampled_from(fragments), max_size=6), cuts=st.lists(st.integers(0, 400), max_size=12))
        @settings(max_examples=200, deadline=None)
        def check(parts: list[str], cuts: list[int]) -> None:
            text = "".join(parts)
            borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
            pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
            whole = join(parse(parser_class(ParserInit()), [text]))
            assert join(parse(parser_class(ParserInit()), pieces)) == whole
            assert join(parse(parser_class(ParserInit()), list(text))) == whole

        check()

    def test_plain_text_passes_unchanged(self, parser_class: type[OutputParser]) -> None:
        """Text without markers comes out as it went in, character for character.

        If it fails: strip nothing that does not stand beside a marker, and let go of all that is held back in `finish`.
        """
        text = "  Two < three, {braces} and\n\na tail é. "
        assert join(parse(parser_class(ParserInit()), list(text))) == [("text", "", text)]

    def test_arguments_are_json(self, parser_class: type[OutputParser]) -> None:
        """The pieces of each call's arguments join to a JSON object in UTF-8; calls are counted from 0.

        If it fails: parse a call before it is announced, and emit as text what is no JSON object: an unfinished call
        too.
        """
        for sample in self.samples:
            joined = join(parse(parser_class(ParserInit()), [sample]))
            starts = [entry for entry in joined if entry[0] == "call"]
            assert [entry[1] for entry in starts] == [str(index) for index in range(len(starts))]
            for entry in joined:
                if entry[0] == "arguments":
                    assert isinstance(strict_json(entry[2]), dict)
                    entry[2].encode()  # a lone surrogate could not be sent

    def test_no_visible_text_is_lost(self, parser_class: type[OutputParser]) -> None:
        """Every character but markers and the space around them stands in some event, or in a complete call.

        If it fails: a call that turns out to be none comes out as the text that it was; `finish` lets go of the rest.
        """
        for sample in self.samples:
            events = parse(parser_class(ParserInit()), [sample])
            seen = "".join(event.text for event in events if isinstance(event, TextDelta | ReasoningDelta))
            calls = any(isinstance(event, ToolCallStart) for event in events)
            rest = sample
            for marker in parser_class.markers:
                rest = rest.replace(marker, "").replace(marker.replace("<", "</"), "")
            if not calls:
                kept = seen
                for marker in parser_class.markers:
                    kept = kept.replace(marker, "").replace(marker.replace("<", "</"), "")
                assert "".join(kept.split()) == "".join(rest.split())
