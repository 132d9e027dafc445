"""The body of Anthropic's messages API, and how it reads as a chat.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from quire_server.errors import ApiError
from quire_server.fields import RequestBody
from quire_server.protocol import ChatRequest, Function, Message, Tool


class Block(RequestBody):
    """A part of a message: text, thinking, tool_use or tool_result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class AnthropicMessage(RequestBody):
    """A turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(RequestBody):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Literal[False] | None = None
    """Inputs cannot be held to the schema: that needs structured output, which is not available."""


class ToolChoice(RequestBody):
    """auto: the model may call; none: tools are not shown to it. Calls cannot be forced."""

    type: Literal["auto", "none"]
    disable_parallel_tool_use: Literal[False] | None = None


class Thinking(RequestBody):
    """Whether the model is asked to think first."""

    type: Literal["enabled", "adaptive", "disabled"]


class CountRequest(RequestBody):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    """A served model's name."""
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=4096)
    """The conversation."""
    system: str | list[Block] | None = None
    """What stands before it."""
    tools: list[AnthropicTool] | None = Field(default=None, max_length=128)
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it may."""
    thinking: Thinking | None = None
    """Whether it thinks first."""

    def chat_fields(self) -> dict[str, Any]:
        """Fields of a `ChatRequest` that asks the same. Raises ApiError for content that the model cannot read."""
        messages = [] if self.system is None else [_system(self.system)]
        for index, message in enumerate(self.messages):
            messages += _messages(index, message)
        tools = [Tool(type="function", function=Function(**_function(tool))) for tool in self.tools or ()]
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return {
            "model": self.model,
            "messages": messages,
            "tools": tools or None,
            "tool_choice": self.tool_choice.type if self.tool_choice else None,
            "chat_template_kwargs": thinking or None,
            "continue_final_message": self.messages[-1].role == "assistant" or None,
            "add_generation_prompt": False if self.messages[-1].role == "assistant" else None,
        }

    def as_chat(self) -> ChatRequest:
        """The chat that asks the same."""
        return ChatRequest.of(self.chat_fields())


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    """Most output tokens."""
    temperature: float | None = Field(default=None, ge=0.0, le=1.0)
    """Divides the logits; 0 is greedy."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    stop_sequences: list[str] | None = None
    """Strings that end the answer."""
    stream: bool | None = None
    """Send the answer as it is made."""

    def chat_fields(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
        return super().chat_fields() | own | {"stop": self.stop_sequences}


def _system(system: str | Sequence[Block]) -> Message:
    return Message(role="system", content=system if isinstance(system, str) else _texts(system, "system"))


def _messages(index: int, message: AnthropicMessage) -> list[Message]:
    """One turn; results of tools come first, as messages of their own."""
    if isinstance(message.content, str):
        return [Message(role=message.role, content=message.content)]
    where = f"messages.[{index}].content"
    results = [block for block in message.content if block.type == "tool_result"]
    uses = [block for block in message.content if block.type == "tool_use"]
    thoughts = [block.thinking or "" for block in message.content if block.type == "thinking"]
    others = [block for block in message.content if block.type not in ("tool_result", "tool_use", "thinking")]
    if message.role == "user" and (uses or thoughts):
        raise _misplaced("tool_use" if uses else "thinking", "assistant", where)
    if message.role == "assistant" and results:
        raise _misplaced("tool_result", "user", where)
    found = [_result(block, where) for block in results]
    if others or uses or thoughts or not found:
        calls = [_call(block, where) for block in uses]
        text, thought = _texts(others, where), "".join(thoughts)
        found.append(
            Message(role=message.role, content=text, tool_calls=calls or None, reasoning_content=thought or None)
        )
    return found


def _misplaced(kind: str, role: str, where: str) -> ApiError:
    message = f"a block of type {kind!r} belongs into a message of role {role!r}"
    return ApiError(400, f"{where}: {message}", param=where, code="invalid_value")


def _texts(blocks: Sequence[Block], where: str) -> str:
    for place, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            message = f"content of type {block.type[:40]!r} is not supported; the model reads text"
            raise ApiError(400, message, param=f"{where}.[{place}].type", code="unsupported_value")
    return "".join(block.text or "" for block in blocks)


def _call(block: Block, where: str) -> dict[str, Any]:
    if not block.id or not block.name:
        raise ApiError(400, f"{where}: a tool_use block needs id, name and input", param=where)
    function = {"name": block.name, "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: Block, where: str) -> Message:
    if not block.tool_use_id:
        raise ApiError(400, f"{where}: a tool_result block needs tool_use_id", param=where)
    text = _texts(block.content, f"{where}.content") if isinstance(block.content, list) else block.content or ""
    return Message(role="tool", content=text, tool_call_id=block.tool_use_id)


def _function(tool: AnthropicTool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
