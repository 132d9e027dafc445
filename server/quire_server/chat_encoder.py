"""Chat completions as OpenAI writes them, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.encoding import Meta, RunningUsage, Wants, usage_object
from quire_server.errors import APOLOGY
from quire_server.events import (
    Choice,
    Event,
    Failure,
    Finish,
    Prompt,
    Reasoning,
    Text,
    Tokens,
    ToolArguments,
    ToolStart,
    Usage,
    Whole,
)
from quire_server.logprobs import chat_content, prompt_logprobs
from quire_server.sse import Texts


def whole_chat(meta: Meta, wants: Wants, whole: Whole) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    answer = meta.head("chat.completion") | {
        "choices": [_choice(index, choice, wants) for index, choice in enumerate(whole.choices)],
        "usage": usage_object(whole.usage),
        "service_tier": None,
        "system_fingerprint": None,
    }
    prompt = whole.prompts.get(0)
    if prompt is not None and wants.token_ids:
        answer["prompt_token_ids"] = list(prompt.token_ids)
    if prompt is not None and wants.prompt_logprobs:
        answer["prompt_logprobs"] = prompt_logprobs(prompt.logprobs)
    return answer


def _choice(index: int, choice: Choice, wants: Wants) -> dict[str, Any]:
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in choice.tool_calls
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text if choice.text or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if choice.reasoning:
        message |= {"reasoning_content": choice.reasoning, "reasoning": choice.reasoning}
    if calls:
        message["tool_calls"] = calls
    logprobs = None
    if wants.logprobs is not None:
        content = chat_content(choice.token_ids, choice.logprobs, wants.logprobs)[: choice.num_shown]
        logprobs = {"content": content, "refusal": None}
    assert choice.finish is not None
    answer = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": choice.finish.reason,
        "stop_reason": choice.finish.stop_reason,
    }
    if wants.token_ids:
        answer["token_ids"] = choice.token_ids
    return answer


class ChatChunks:
    """Turns events into chunks. Log probabilities wait for the chunk that their text is part of."""

    def __init__(self, meta: Meta, wants: Wants, num_choices: int, num_prompt_tokens: int) -> None:
        self._head = meta.head("chat.completion.chunk") | {"system_fingerprint": None}
        self._wants = wants
        self._num_choices = num_choices
        self._usage = RunningUsage(wants, num_prompt_tokens)
        self._tokens: dict[int, Tokens] = {}
        self._is_plain = not wants.tokens
        self._texts = Texts(lambda choice, text: self._chunk(choice, {"content": text}))

    def begin(self) -> list[dict[str, Any]]:
        """One chunk per choice that names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta) for index in range(self._num_choices)]

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Chunks for one event."""
        match event:
            case Text():
                return [self._with_tokens(event.choice, {"content": event.text})]
            case Reasoning():
                delta = {"reasoning_content": event.text, "reasoning": event.text}
                return [self._with_tokens(event.choice, delta)]
            case Tokens():
                self._keep(event)
                return [self._with_tokens(event.choice, {})] if event.alone and self._wants.token_ids else []
            case ToolStart():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.call_id, "type": "function", "function": function}
                return [self._with_tokens(event.choice, {"tool_calls": [call]})]
            case ToolArguments():
                call = {"index": event.index, "function": {"arguments": event.text}}
                return [self._with_tokens(event.choice, {"tool_calls": [call]})]
            case Finish():
                last = {"finish_reason": event.reason, "stop_reason": event.stop_reason}
                return [self._with_tokens(event.choice, {}, last)]
            case Prompt():
                return [self._prompt(event)] if self._wants.token_ids or self._wants.prompt_logprobs else []
            case Usage():
                return [self._head | {"choices": [], "usage": usage_object(event)}] if self._wants.usage else []
            case Failure():
                return [failure(event)]

    def quick(self, events: Sequence[Event]) -> bytes | None:
        """The bytes of a text that comes alone; None: `feed` makes the chunks."""
        return self._texts.written(events) if self._is_plain else None

    def _keep(self, event: Tokens) -> None:
        self._usage.count(len(event.token_ids))
        if self._wants.logprobs is None and not self._wants.token_ids:
            return
        held = self._tokens.get(event.choice)
        self._tokens[event.choice] = event if held is None else held.joined(event)

    def _with_tokens(self, choice: int, delta: dict[str, Any], last: dict[str, Any] | None = None) -> dict[str, Any]:
        more = dict(last or {})
        tokens = self._tokens.pop(choice, None)
        if tokens is not None and self._wants.logprobs is not None:
            content = chat_content(tokens.token_ids, tokens.logprobs or (), self._wants.logprobs)[: tokens.num_shown]
            more["logprobs"] = {"content": content, "refusal": None}
        if tokens is not None and self._wants.token_ids:
            more["token_ids"] = list(tokens.token_ids)
        return self._chunk(choice, delta, more)

    def _chunk(self, choice: int, delta: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
        entry = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None} | (more or {})
        return self._usage.add(self._head | {"choices": [entry]})

    def _prompt(self, event: Prompt) -> dict[str, Any]:
        chunk: dict[str, Any] = self._head | {"choices": []}
        if self._wants.token_ids:
            chunk["prompt_token_ids"] = list(event.token_ids)
        if self._wants.prompt_logprobs:
            chunk["prompt_logprobs"] = prompt_logprobs(event.logprobs)
        return self._usage.add(chunk)


def failure(event: Failure) -> dict[str, Any]:
    """A failure after the first byte: the client raises it, and no [DONE] follows."""
    message = f"{APOLOGY} {event.message}"
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
