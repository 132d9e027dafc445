"""Messages as Anthropic writes them, whole or as named events.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from quire_server.encoding import Meta
from quire_server.errors import APOLOGY
from quire_server.events import Event, Failure, Finish, Reasoning, Text, ToolArguments, ToolStart, Usage

Chunk = dict[str, Any]

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """Turns events into Anthropic's. One content block is open at a time."""

    def __init__(self, meta: Meta, num_prompt_tokens: int) -> None:
        self._meta = meta
        self._num_prompt_tokens = num_prompt_tokens
        self._open: tuple[str, int] | None = None
        """Kind of the open block, and which tool call it is."""
        self._num_blocks = 0
        self._finish = Finish(0, "stop")

    def begin(self) -> list[Chunk]:
        """The message's frame."""
        message: Chunk = {
            "id": self._meta.id,
            "type": "message",
            "role": "assistant",
            "model": self._meta.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(self._num_prompt_tokens)),
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def feed(self, event: Event) -> list[Chunk]:
        """Anthropic's events for one of ours."""
        match event:
            case Text():
                return self._piece("text", 0, {"type": "text", "text": ""}, {"type": "text_delta", "text": event.text})
            case Reasoning():
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                return self._piece("thinking", 0, empty, {"type": "thinking_delta", "thinking": event.text})
            case ToolStart():
                block: Chunk = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
                return self._enter("tool_use", event.index, block)
            case ToolArguments():
                return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
            case Finish():
                self._finish = event
                return []
            case Usage():
                return [*self._leave(), self._last(event), {"type": "message_stop"}]
            case Failure():
                error = {"type": "api_error", "message": f"{APOLOGY} {event.message}"}
                return [{"type": "error", "error": error}]
        return []

    def _piece(self, kind: str, which: int, block: Chunk, delta: Chunk) -> list[Chunk]:
        return [*self._enter(kind, which, block), self._delta(delta)]

    def _enter(self, kind: str, which: int, block: Chunk) -> list[Chunk]:
        if self._open == (kind, which):
            return []
        chunks = self._leave()
        self._open = (kind, which)
        self._num_blocks += 1
        return [*chunks, {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}]

    def _leave(self) -> list[Chunk]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._num_blocks - 1}]

    def _delta(self, delta: Chunk) -> Chunk:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _last(self, usage: Usage) -> Chunk:
        reason, sequence = STOP_REASONS[self._finish.reason], None
        if reason == "end_turn" and isinstance(self._finish.stop_reason, str):
            reason, sequence = "stop_sequence", self._finish.stop_reason
        return {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage(usage),
        }


def whole_message(chunks: Iterable[Chunk]) -> Chunk:
    """The message that a client puts together from a stream's events."""
    message: Chunk = {}
    arguments: dict[int, str] = {}
    for chunk in chunks:
        match chunk["type"]:
            case "message_start":
                message = chunk["message"]
            case "content_block_start":
                message["content"].append(dict(chunk["content_block"]))
            case "content_block_delta":
                _add(message["content"], arguments, chunk["index"], chunk["delta"])
            case "message_delta":
                message |= chunk["delta"] | {"usage": chunk["usage"]}
    for index, text in arguments.items():
        message["content"][index]["input"] = _parsed(text)
    return message


def _add(content: list[Chunk], arguments: dict[int, str], index: int, delta: Chunk) -> None:
    if delta["type"] == "input_json_delta":
        arguments[index] = arguments.get(index, "") + delta["partial_json"]
        return
    field = "text" if delta["type"] == "text_delta" else "thinking"
    content[index][field] += delta[field]


def _parsed(text: str) -> Any:
    """A call's arguments; the output parsers give valid JSON, unless the output was cut within it."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts what was read from the cache apart from what was not."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
