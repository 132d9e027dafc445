"""Completions as OpenAI writes them, whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quire_server.chat_encoder import failure
from quire_server.encoding import Meta, RunningUsage, Wants, usage_object
from quire_server.events import (
    Event,
    Failure,
    Finish,
    Prompt,
    Text,
    Tokens,
    Usage,
)
from quire_server.logprobs import CompletionLogprobs, prompt_logprobs
from quire_server.sse import Texts


class CompletionChunks:
    """Turns events into chunks.

    Args:
        meta, wants: as for chats.
        n: choices per prompt. num_prompts: prompts. num_prompt_tokens: of all prompts.
        echo: text of a prompt by its index; None: the prompt is not repeated.
        only_echo: what is generated is left out, for requests that want the prompt scored.
        token_text: text of a token id.
    """

    def __init__(
        self,
        meta: Meta,
        wants: Wants,
        n: int,
        num_prompts: int,
        num_prompt_tokens: int,
        *,
        echo: Callable[[int], str] | None = None,
        only_echo: bool = False,
        token_text: Callable[[int], str] = str,
    ) -> None:
        self._head = meta.head("text_completion") | {"system_fingerprint": None}
        self._wants, self._n, self._echo, self._only_echo = wants, n, echo, only_echo
        self._usage = RunningUsage(wants, num_prompt_tokens)
        self._num_choices = n * num_prompts
        self._logprobs = [CompletionLogprobs(wants.logprobs or 0, token_text) for _ in range(self._num_choices)]
        self._tokens: dict[int, Tokens] = {}
        self._is_plain = not wants.tokens and not only_echo
        self._tells_ids = wants.token_ids and not only_echo  # as they come, with text or without
        self._texts = Texts(self._chunk)

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Chunks for one event."""
        match event:
            case Prompt():
                return self._prompt(event)
            case Tokens():
                self._keep(event)
                return [self._chunk(event.choice, "")] if event.alone and self._tells_ids else []
            case Text():
                return [] if self._only_echo else [self._chunk(event.choice, event.text)]
            case Finish():
                last = {"finish_reason": event.reason, "stop_reason": event.stop_reason}
                return [self._chunk(event.choice, "", last)]
            case Usage():
                shown = Usage(event.prompt_tokens, 0, event.cached_tokens) if self._only_echo else event
                return [self._head | {"choices": [], "usage": usage_object(shown)}] if self._wants.usage else []
            case Failure():
                return [failure(event)]
            case _:
                return []

    def quick(self, events: Sequence[Event]) -> bytes | None:
        """As for chats."""
        return self._texts.written(events) if self._is_plain else None

    def _keep(self, event: Tokens) -> None:
        if self._only_echo:
            return
        self._usage.count(len(event.token_ids))
        if self._wants.logprobs is None and not self._wants.token_ids:
            return
        held = self._tokens.get(event.choice)
        self._tokens[event.choice] = event if held is None else held.joined(event)

    def _prompt(self, event: Prompt) -> list[dict[str, Any]]:
        chunks = []
        for choice in range(event.index * self._n, (event.index + 1) * self._n):
            more: dict[str, Any] = {}
            if self._wants.token_ids:
                more["prompt_token_ids"] = list(event.token_ids)
            if self._wants.prompt_logprobs:
                more["prompt_logprobs"] = prompt_logprobs(event.logprobs)
            text = self._echo(event.index) if self._echo is not None else ""
            if self._echo is not None and self._wants.logprobs is not None:
                more["logprobs"] = self._logprobs[choice].add(event.token_ids, event.logprobs)
            if text or more:
                chunks.append(self._chunk(choice, text, more))
        return chunks

    def _chunk(self, choice: int, text: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
        entry = {"index": choice, "text": text, "logprobs": None, "finish_reason": None} | (more or {})
        tokens = self._tokens.pop(choice, None)
        if tokens is not None and self._wants.logprobs is not None:
            shown = tokens.token_ids[: tokens.num_shown], (tokens.logprobs or ())[: tokens.num_shown]
            entry["logprobs"] = self._logprobs[choice].add(*shown)
        if tokens is not None and self._wants.token_ids:
            entry["token_ids"] = list(tokens.token_ids)
        return self._usage.add(self._head | {"choices": [entry]})


def whole_completion(chunks: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """The answer to a request that does not stream: its chunks, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for entry in chunk["choices"]:
            into = choices.setdefault(entry["index"], {"index": entry["index"], "text": "", "logprobs": None})
            _join(into, entry)
    head = {key: value for key, value in chunks[0].items() if key not in ("choices", "usage")}
    return head | {"choices": [choices[index] for index in sorted(choices)], "usage": usage_object(usage)}


def _join(into: dict[str, Any], entry: dict[str, Any]) -> None:
    into["text"] += entry["text"]
    for key, value in entry.items():
        if key in ("index", "text"):
            continue
        if key == "logprobs" and value is not None:
            kept = into["logprobs"] or {name: [] for name in value}
            into["logprobs"] = {name: kept[name] + value[name] for name in value}
        elif key == "token_ids":
            into[key] = into.get(key, []) + value
        elif key != "logprobs":
            into[key] = value
