"""Lets a running server answer a conversation, or continue a text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from quire import RequestError, SamplingParams
from quire.commands import Answer, Conversation, Writer
from quire.plugin import ParserEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart

from quire_server.client.connection import Connection
from quire_server.fields import DIRECT

SENT = frozenset({*DIRECT, "max_tokens", "logit_bias"}) - {"n", "prompt_logprobs"}
"""Sampling parameters that travel; the others are of no use at a terminal, or are the core's own."""


def sent_params(params: SamplingParams) -> dict[str, Any]:
    """The parameters that were said, as fields of a request. Raises RequestError for one that cannot be sent."""
    said = {name: getattr(params, name) for name in params.model_fields_set}
    if bad := sorted(set(said) - SENT):
        raise RequestError(f"{bad[0]} cannot be set for a server", param=bad[0])
    return {name: value for name, value in said.items() if value is not None}


@dataclass
class RemoteTalker(Conversation):
    """A conversation with a server's model.

    Attributes:
        connection: to the server.
        model: name of the model that answers.
    """

    connection: Connection
    model: str

    def __post_init__(self) -> None:
        sent_params(self.params)

    def set_params(self, params: SamplingParams) -> None:
        sent_params(params)
        self.params = params

    def figures(self) -> list[str]:
        return [f"{self.model} at {self.connection.address.name}"]

    def answer(self, messages: Sequence[dict[str, Any]]) -> Answer:
        body: dict[str, Any] = {"messages": self.with_system(messages)}
        if self.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.think}
        return write_answer(self.connection, "/v1/chat/completions", self._body(body))

    def _body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **body, **sent_params(self.params)}


def write_answer(connection: Connection, path: str, body: Mapping[str, Any]) -> Answer:
    """Write the answer to stdout as it comes. Ctrl-C ends the request and keeps what there is.

    Args:
        connection: of the server. path: of chat completions or completions. body: without the stream's fields.

    Raises:
        RequestError, EngineError: as `Connection.stream` does.
    """
    answer, writer, started = Answer(), Writer(), time.perf_counter()
    asked = {**body, "stream_options": {"include_usage": True}}
    try:
        with closing(connection.stream(path, asked)) as chunks:
            for chunk in chunks:
                _count(answer, chunk.get("usage"))
                if (events := list(_events(chunk))) and not answer.first_token_s:
                    answer.first_token_s = time.perf_counter() - started
                answer.text += writer.write(events)
                for choice in chunk.get("choices") or ():
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    except KeyboardInterrupt:
        answer.finish_reason = "abort"
    finally:
        writer.end()
    answer.total_s = time.perf_counter() - started
    return answer


def _events(chunk: Mapping[str, Any]) -> Iterator[ParserEvent]:
    """What a chunk of either API adds to the answer."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield ReasoningDelta(thought)
        if text := delta.get("content") or choice.get("text"):
            yield TextDelta(text)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if name := function.get("name"):
                yield ToolCallStart(call["index"], name)
            if arguments := function.get("arguments"):
                yield ToolCallArguments(call["index"], arguments)


def _count(answer: Answer, usage: Mapping[str, Any] | None) -> None:
    if usage:
        answer.num_prompt_tokens = usage.get("prompt_tokens", 0)
        answer.num_output_tokens = usage.get("completion_tokens", 0)
        answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
