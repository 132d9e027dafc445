"""The bodies of OpenAI's completions and chat completions, with vLLM's further fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quire_server.fields import RequestBody, SamplingFields


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: str | list[TextPart] | None = None
    """What is said."""
    name: str | None = None
    """The speaker's name."""
    tool_calls: list[dict[str, Any]] | None = None
    """Calls that the assistant made."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """The assistant's reasoning."""
    reasoning: str | None = None
    """The same, as it is called by others."""


class Function(BaseModel):
    """What a tool is told to the model as."""

    model_config = ConfigDict(extra="allow", strict=True)

    strict: Literal[False] | None = None
    """Arguments cannot be held to the schema: that needs structured output, which is not available."""


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    """The conversation."""
    max_completion_tokens: int | None = None
    """Most output tokens; wins over max_tokens. Left out: as many as the context allows."""
    logprobs: bool | None = None
    """Return log probabilities of the answer's tokens."""
    top_logprobs: int | None = None
    """With logprobs: so many alternatives per token."""
    tools: list[Tool] | None = Field(default=None, max_length=128)
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto"] | None = None
    """none: tools are not shown to the model. Calls cannot be forced."""
    parallel_tool_calls: Literal[True] | None = None
    """The model may make several calls; this cannot be forbidden."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Handed to the chat template, `none` as enable_thinking: false."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant's answer begins; true by default."""
    continue_final_message: bool | None = None
    """Go on with the last message instead of answering it."""

    @classmethod
    def of(cls, checked: Mapping[str, Any]) -> ChatRequest:
        """A body of values that another API's body has checked already."""
        left_out = {name: field.get_default() for name, field in cls.model_fields.items()}
        return cls.model_construct(**(left_out | dict(checked)))


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] | list[str | list[int]]
    """Text, token ids, or a list of either."""
    logprobs: int | None = None
    """Return log probabilities of the answer's tokens with so many alternatives."""
    echo: bool | None = None
    """Begin the answer with the prompt."""


class TokenizeRequest(RequestBody):
    """Body of POST /tokenize: a prompt, or a conversation."""

    model: str | None = None
    """A served model's name."""
    prompt: str | None = None
    """Text."""
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    """A conversation, rendered by the chat template."""
    tools: list[Tool] | None = Field(default=None, max_length=128)
    """Tools that the conversation offers."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template."""
    continue_final_message: bool = False
    """End with the last message, for the model to go on with it."""
    add_special_tokens: bool = True
    """Add what the model expects at the beginning of a text; a rendered conversation has it already."""
    add_generation_prompt: bool = True
    """End a conversation where the assistant's answer begins."""
    return_token_strs: bool = False
    """Return each token's text too."""


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    model: str | None = None
    """A served model's name."""
    tokens: list[int] = Field(max_length=1 << 20)
    """Token ids."""
