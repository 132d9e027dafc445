"""What the encoders of OpenAI's two older APIs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire_server.events import Usage


@dataclass(frozen=True, slots=True)
class Meta:
    """What every chunk of an answer repeats: its id, when it was created (seconds), the model's name."""

    id: str
    created: int
    model: str

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True)
class Wants:
    """What a request asked to be told.

    Attributes:
        logprobs: alternatives per token; None: no log probabilities.
        token_ids: token ids beside text.
        usage: a chunk with the usage at the end. running_usage: the usage so far in every chunk.
        prompt_logprobs: the prompt's.
    """

    logprobs: int | None = None
    token_ids: bool = False
    usage: bool = False
    running_usage: bool = False
    prompt_logprobs: bool = False

    @property
    def tokens(self) -> bool:
        """Whether the tokens of an answer matter beside its text."""
        return self.logprobs is not None or self.token_ids or self.running_usage


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class RunningUsage:
    """Adds `usage` to chunks, as the request wants it."""

    def __init__(self, wants: Wants, num_prompt_tokens: int) -> None:
        self._wants = wants
        self._prompt = num_prompt_tokens
        self._completion = 0

    def count(self, num_tokens: int) -> None:
        self._completion += num_tokens

    def add(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if self._wants.running_usage:
            chunk["usage"] = usage_object(Usage(self._prompt, self._completion))
        elif self._wants.usage:
            chunk["usage"] = None
        return chunk
