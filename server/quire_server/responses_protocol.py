"""The body of OpenAI's responses API, and how it reads as a chat. Nothing is stored.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from quire_server.errors import ApiError
from quire_server.fields import RequestBody
from quire_server.protocol import ChatRequest, Function, Message, Tool

STATELESS = "nothing is stored here; send the conversation as input"
TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


class FunctionTool(RequestBody):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None
    """Arguments cannot be held to the schema: that needs structured output, which is not available."""


class ReasoningOptions(RequestBody):
    """How hard the model is to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(RequestBody):
    """Body of POST /v1/responses."""

    model: str | None = None
    """A served model's name; left out: the one that is served."""
    input: str | Annotated[list[dict[str, Any]], Field(max_length=4096)]
    """A question, or a conversation."""
    instructions: str | None = None
    """What stands before it."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Most output tokens; left out: as many as the context allows."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p."""
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto"] | None = None
    """none: tools are not shown to the model. Calls cannot be forced."""
    parallel_tool_calls: Literal[True] | None = None
    """The model may make several calls; this cannot be forbidden."""
    reasoning: ReasoningOptions | None = None
    """How hard to think."""
    metadata: dict[str, str] | None = None
    """Sent back as it is."""
    stream: bool | None = None
    """Send the answer as it is made."""

    def as_chat(self) -> ChatRequest:
        """The chat that asks the same. Raises ApiError for items that the model cannot read."""
        begin = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        asked = [Message(role="user", content=self.input)] if isinstance(self.input, str) else _messages(self.input)
        if not asked:
            raise ApiError(400, "input is an empty list", param="input", code="invalid_value")
        tools = [Tool(type="function", function=Function(**_function(tool))) for tool in self.tools or ()]
        given = {
            "model": self.model,
            "messages": begin + asked,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": tools or None,
            "tool_choice": self.tool_choice,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        return ChatRequest.of(given)

    def shown(self) -> dict[str, Any]:
        """The fields that an answer repeats."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "metadata": self.metadata or {},
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "previous_response_id": None,
            "background": False,
            "store": False,
        }


def _messages(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages of a list of items; calls and reasoning join the assistant's message that they belong to."""
    found: list[Message] = []
    thought = ""
    for index, item in enumerate(items):
        where, kind = f"input.[{index}]", item.get("type", "message")
        if kind == "message":
            message = _message(item, where)
        elif kind == "function_call":
            function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
            call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
            if found and found[-1].role == "assistant":
                found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
                continue
            message = Message(role="assistant", content="", tool_calls=[call])
        elif kind == "function_call_output":
            message = Message(role="tool", content=_output(item, where), tool_call_id=_text(item, "call_id", where))
        elif kind == "reasoning":
            thought += _parts(item.get("content") or [], f"{where}.content", frozenset({"reasoning_text"}))
            continue
        else:
            shown = str(kind)[:40]
            raise ApiError(
                400, f"items of type {shown!r} are not supported", param=f"{where}.type", code="unsupported_value"
            )
        if thought and message.role == "assistant":
            message.reasoning_content, thought = thought, ""
        found.append(message)
    return found


def _message(item: Mapping[str, Any], where: str) -> Message:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        message = f"{where}.role is {str(role)[:40]!r}; it must be user, assistant, system or developer"
        raise ApiError(400, message, param=f"{where}.role", code="invalid_value")
    text = content if isinstance(content, str) else _parts(content, f"{where}.content", TEXT_PARTS)
    return Message(role=role, content=text)


def _parts(parts: Any, where: str, kinds: frozenset[str]) -> str:
    if not isinstance(parts, list):
        raise ApiError(400, f"{where} must be text or a list of parts", param=where, code="invalid_type")
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds or not isinstance(part.get("text"), str):
            message = f"content of type {str(kind)[:40]!r} is not supported; the model reads text"
            raise ApiError(400, message, param=f"{where}.[{place}].type", code="unsupported_value")
    return "".join(part["text"] for part in parts)


def _output(item: Mapping[str, Any], where: str) -> str:
    output = item.get("output")
    return output if isinstance(output, str) else _parts(output, f"{where}.output", TEXT_PARTS)


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{where}.{name} must be text", param=f"{where}.{name}", code="invalid_type")
    return value


def _function(tool: FunctionTool) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    return {"name": tool.name, "description": tool.description or "", "parameters": parameters}
