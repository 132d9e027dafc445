"""Qwen's conventions: `<think>...</think>` and `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

White space next to a marker belongs to the marker; a call that is no call comes out as the text it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from types import MappingProxyType

from quire.contract.parsing import (
    OutputParser,
    ParserEvent,
    ParserInit,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


class _Mode(Enum):
    TEXT = (THINK, CALL)
    REASONING = (END_THINK,)
    CALL = (END_CALL,)


_SAMPLE = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
SAMPLES = (
    "<think>\nones: 7+5\n</think>\n\n12",
    _SAMPLE,
    f"Let me see. {_SAMPLE}\n{_SAMPLE}",
    "<tool_call>{not json}</tool_call> after",
    '<tool_call>{"name": "x", "arguments": "{\\"a\\": 1}"}</tool_call>',
    "<tool_call>never closed",
    "<think>never closed",
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": "\\ud83d\\ude00", "b": "\\n"}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": "\\ud83d"}}</tool_call>',
)
"""Outputs for the conformance kit: right ones, broken ones, unfinished ones."""


class QwenParser(OutputParser):
    """Splits at markers; a tool call comes out when it is complete, so its arguments are always valid JSON."""

    markers = (CALL, THINK)
    conformance = MappingProxyType({"samples": SAMPLES})

    def __init__(self, init: ParserInit) -> None:
        super().__init__(init)
        self._mode = _Mode.REASONING if init.in_reasoning else _Mode.TEXT
        self._held = ""
        self._after_marker = init.in_reasoning
        self._num_calls = 0
        self._space = ""  # white space before an open <tool_call>, in case it turns out to be text

    def feed(self, text: str, token_ids: Sequence[int]) -> list[ParserEvent]:
        self._held += text
        events: list[ParserEvent] = []
        while True:
            if self._after_marker:
                self._held = self._held.lstrip()
                if not self._held:
                    return _merge(events)
                self._after_marker = False
            found = [(at, marker) for marker in self._mode.value if (at := self._held.find(marker)) >= 0]
            if not found:
                self._emit_safe(events)
                return _merge(events)
            at, marker = min(found)
            body, self._held = self._held[:at], self._held[at + len(marker) :]
            self._close(body, marker, events)

    def finish(self) -> list[ParserEvent]:
        held, self._held = self._held, ""
        if self._mode is _Mode.CALL:
            held = self._space + CALL + held
        self._mode = _Mode.TEXT if self._mode is _Mode.CALL else self._mode
        return [self._delta(held)] if held else []

    def _emit_safe(self, events: list[ParserEvent]) -> None:
        """Let go of what cannot be part of a marker, or the white space before one."""
        if self._mode is _Mode.CALL:
            return
        safe = len(self._held) - max(_overlap(self._held, marker) for marker in self._mode.value)
        safe = len(self._held[:safe].rstrip())
        if safe:
            events.append(self._delta(self._held[:safe]))
            self._held = self._held[safe:]

    def _close(self, body: str, marker: str, events: list[ParserEvent]) -> None:
        """A marker was met after `body`."""
        if self._mode is _Mode.CALL:
            self._mode, self._after_marker = _Mode.TEXT, self._end_call(body, events)
            return
        shown = body.rstrip()
        if shown:
            events.append(self._delta(shown))
        self._space = body[len(shown) :]
        self._mode = {THINK: _Mode.REASONING, CALL: _Mode.CALL}.get(marker, _Mode.TEXT)
        self._after_marker = self._mode is not _Mode.CALL

    def _end_call(self, body: str, events: list[ParserEvent]) -> bool:
        """Whether the body was a call; if not, it comes out as text, with the space around it."""
        call = _parse_call(body)
        if call is None:
            events.append(TextDelta(self._space + CALL + body + END_CALL))
            return False
        name, arguments = call
        events += [ToolCallStart(self._num_calls, name), ToolCallArguments(self._num_calls, arguments)]
        self._num_calls += 1
        return True

    def _delta(self, text: str) -> ParserEvent:
        return ReasoningDelta(text) if self._mode is _Mode.REASONING else TextDelta(text)


def _parse_call(body: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text), or None if the body is no call.

    What Python reads but JSON (RFC 8259) has no form for makes no call: NaN, infinities, and halves
    of surrogate pairs, which no UTF-8 stream could carry.
    """
    try:
        call = json.loads(body)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (call["name"] + text).encode()
    except (ValueError, RecursionError):
        return None
    return call["name"], text


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _merge(events: list[ParserEvent]) -> list[ParserEvent]:
    """Join neighbouring pieces of the same kind."""
    merged: list[ParserEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            merged[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(last.text + event.text)
        else:
            merged.append(event)
    return merged
