"""Responses as OpenAI writes them: numbered events, of which the last holds the whole.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from typing import Any

from quire_server.encoding import Meta
from quire_server.errors import APOLOGY
from quire_server.events import Event, Failure, Finish, Reasoning, Text, ToolArguments, ToolStart, Usage

Chunk = dict[str, Any]


class ResponseEvents:
    """Turns events into those of the responses API. One output item is open at a time.

    Args:
        meta: of the answer. repeated: the request's fields that the answer shows.
    """

    def __init__(self, meta: Meta, repeated: Chunk) -> None:
        self._meta = meta
        self._response: Chunk = {
            "id": meta.id,
            "object": "response",
            "created_at": meta.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": meta.model,
            "output": [],
            "usage": None,
            **repeated,
        }
        self._next = 0
        self._open: tuple[str, int] | None = None
        """Kind of the open item, and which tool call it is."""
        self._finish = Finish(0, "stop")

    def begin(self) -> list[Chunk]:
        """The response has been created."""
        started = {"response": self._snapshot()}
        return self._numbered([{"type": "response.created"} | started, {"type": "response.in_progress"} | started])

    def feed(self, event: Event) -> list[Chunk]:
        """The API's events for one of ours."""
        return self._numbered(self._events(event))

    def _events(self, event: Event) -> list[Chunk]:
        match event:
            case Text():
                return [*self._enter("message", 0), self._delta("response.output_text.delta", event.text)]
            case Reasoning():
                return [*self._enter("reasoning", 0), self._delta("response.reasoning_text.delta", event.text)]
            case ToolStart():
                return self._enter("function_call", event.index, call_id=event.call_id, name=event.name)
            case ToolArguments():
                item = self._item()
                item["arguments"] += event.text
                place = {"item_id": item["id"], "output_index": self._index(), "delta": event.text}
                return [{"type": "response.function_call_arguments.delta"} | place]
            case Finish():
                self._finish = event
                return []
            case Usage():
                return [*self._leave(), self._last(event)]
            case Failure():
                self._response |= {"status": "failed", "error": _error(event)}
                return [{"type": "response.failed", "response": self._snapshot()}]
        return []

    # Items ------------------------------------------------------------------------------------

    def _enter(self, kind: str, which: int, **fields: str) -> list[Chunk]:
        if self._open == (kind, which):
            return []
        left = self._leave()
        self._open = (kind, which)
        item = _new_item(kind, f"{self._meta.id.removeprefix('resp_')}{len(self._response['output'])}", fields)
        self._response["output"].append(item)
        added: Chunk = {"output_index": self._index(), "item": dict(item)}
        chunks: list[Chunk] = [{"type": "response.output_item.added"} | added]
        if kind != "function_call":
            item["content"] = [_new_part(kind)]
            chunks.append({"type": "response.content_part.added", "part": _new_part(kind)} | self._place())
        return [*left, *chunks]

    def _leave(self) -> list[Chunk]:
        if self._open is None:
            return []
        (kind, _), item = self._open, self._item()
        item["status"] = "completed" if self._finish.reason != "length" else "incomplete"
        if kind == "function_call":
            place = {"item_id": item["id"], "output_index": self._index()}
            done = [
                {
                    "type": "response.function_call_arguments.done",
                    "name": item["name"],
                    "arguments": item["arguments"],
                }
                | place
            ]
        else:
            part = item["content"][0]
            name = "response.output_text.done" if kind == "message" else "response.reasoning_text.done"
            text = {"text": part["text"]} | ({"logprobs": []} if kind == "message" else {})
            done = [
                {"type": name} | text | self._place(),
                {"type": "response.content_part.done", "part": dict(part)} | self._place(),
            ]
        self._open = None
        return [*done, {"type": "response.output_item.done", "output_index": self._index(), "item": _copy(item)}]

    def _delta(self, name: str, text: str) -> Chunk:
        self._item()["content"][0]["text"] += text
        more: Chunk = {"logprobs": []} if name == "response.output_text.delta" else {}
        return {"type": name, "delta": text} | more | self._place()

    def _place(self) -> Chunk:
        return {"item_id": self._item()["id"], "output_index": self._index(), "content_index": 0}

    def _item(self) -> Chunk:
        item: Chunk = self._response["output"][-1]
        return item

    def _index(self) -> int:
        return len(self._response["output"]) - 1

    # The whole --------------------------------------------------------------------------------

    def _last(self, usage: Usage) -> Chunk:
        cut = self._finish.reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": _usage(usage),
        }
        return {"type": "response.incomplete" if cut else "response.completed", "response": self._snapshot()}

    def _snapshot(self) -> Chunk:
        return self._response | {"output": [_copy(item) for item in self._response["output"]]}

    def _numbered(self, chunks: list[Chunk]) -> list[Chunk]:
        for chunk in chunks:
            chunk["sequence_number"] = self._next
            self._next += 1
        return chunks


def _new_item(kind: str, number: str, fields: dict[str, str]) -> Chunk:
    if kind == "message":
        return {"id": f"msg_{number}", "type": kind, "status": "in_progress", "role": "assistant", "content": []}
    if kind == "reasoning":
        return {"id": f"rs_{number}", "type": kind, "status": "in_progress", "summary": [], "content": []}
    return {"id": f"fc_{number}", "type": kind, "status": "in_progress", "arguments": "", **fields}


def _new_part(kind: str) -> Chunk:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(item: Chunk) -> Chunk:
    """An event must not change when the item goes on."""
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})


def _error(event: Failure) -> Chunk:
    return {"code": "server_error", "message": f"{APOLOGY} {event.message}"}


def _usage(usage: Usage) -> Chunk:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
