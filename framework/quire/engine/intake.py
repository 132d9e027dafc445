"""Turns what a caller asks into requests, and refuses what cannot be honoured, in the caller's stack."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.contract.request import Request
from quire.errors import RequestError
from quire.params import MAX_COUNT, SamplingParams
from quire.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or `{"prompt": text}` / `{"prompt_token_ids": ids}`, each with an optional `cache_salt`."""

PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


@dataclass(frozen=True, slots=True)
class Submission:
    """One accepted request: its n sequences, and what its output begins with.

    A request that is taken up again brings only the sequences that have not ended, with the tokens
    that they had: those are not told a second time.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    sequences: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What a request is checked against.

    Attributes:
        max_model_len: most tokens of one request, prompt and output.
        vocab_size: token ids are below it.
        seed: engine seed, from which requests without one derive theirs.
        stop_token_ids: the model's own end tokens.
        validate: raises RequestError for parameters that no sampler or processor honours.
    """

    max_model_len: int
    vocab_size: int
    seed: int
    stop_token_ids: frozenset[int]
    validate: Callable[[SamplingParams], None]


class Intake:
    """Checks and prepares requests. Safe to call from several threads at once."""

    def __init__(self, tokenizer: Tokenizer, limits: IntakeLimits, clock: Callable[[], float]) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._clock = clock

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Submission:
        """Tokenize and check. Raises RequestError naming the field, its value and what is allowed."""
        text, token_ids, salt = self._tokens(prompt)
        self._check(token_ids, params)
        if abs(priority) > MAX_COUNT:
            raise RequestError(f"priority is {priority}; it must lie within ±{MAX_COUNT}", param="priority")
        self._limits.validate(params)
        sequences = tuple(
            self._sequence(request_id, index, token_ids, params, priority, salt or cache_salt)
            for index in range(params.n)
        )
        return Submission(request_id, text, token_ids, params, sequences)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...], str]:
        if isinstance(prompt, str):
            return prompt, tuple(self._tokenizer.encode(prompt)), ""
        if not isinstance(prompt, Mapping):
            return None, _token_ids(prompt), ""
        if unknown := sorted(set(prompt) - PROMPT_KEYS):
            raise RequestError(
                f"prompt has unknown keys {unknown}", param="prompt", remedy=f"use {sorted(PROMPT_KEYS)}"
            )
        salt = prompt.get("cache_salt") or ""
        if prompt.get("prompt_token_ids") is not None:
            return prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"]), salt
        if not isinstance(prompt.get("prompt"), str):
            raise RequestError("prompt needs a text under 'prompt', or ids under 'prompt_token_ids'", param="prompt")
        return prompt["prompt"], tuple(self._tokenizer.encode(prompt["prompt"])), salt

    def _check(self, token_ids: tuple[int, ...], params: SamplingParams) -> None:
        limit = self._limits.max_model_len
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt", remedy="give at least one token")
        if len(token_ids) >= limit:
            raise RequestError(
                f"the prompt has {len(token_ids):,} tokens; with max_model_len {limit:,} it may have {limit - 1:,}",
                param="prompt",
                remedy="shorten the prompt, or raise max_model_len",
            )
        room = limit - len(token_ids)
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens is {params.min_tokens}; behind the prompt there is room for {room} tokens",
                param="min_tokens",
                remedy="lower it, or raise max_model_len",
            )
        worst = max(token_ids)
        if worst >= self._limits.vocab_size or min(token_ids) < 0:
            bad = worst if worst >= self._limits.vocab_size else min(token_ids)
            raise RequestError(
                f"the prompt has token id {bad}; ids run from 0 to {self._limits.vocab_size - 1}", param="prompt"
            )

    def _sequence(
        self, request_id: str, index: int, token_ids: tuple[int, ...], params: SamplingParams, priority: int, salt: str
    ) -> Request:
        room = self._limits.max_model_len - len(token_ids)
        stops = frozenset(params.stop_token_ids)
        return Request(
            request_id=sequence_id(request_id, index),
            prompt_token_ids=token_ids,
            params=params,
            arrival_time=self._clock(),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_token_ids=stops if params.ignore_eos else stops | self._limits.stop_token_ids,
            seed=self._seed(request_id, params.seed, index),
            priority=priority,
            cache_salt=salt,
            fork_of=sequence_id(request_id, 0) if index else None,
        )

    def _seed(self, request_id: str, seed: int | None, index: int) -> int:
        """The caller's seed for the first sequence; further ones, and requests without a seed, get their own.

        Derived by hashing, so that neighbouring seeds or ids give unrelated streams.
        """
        if seed is not None and index == 0:
            return seed % 2**64
        source = f"{self._limits.seed}/{request_id}" if seed is None else str(seed % 2**64)
        return int.from_bytes(hashlib.blake2b(f"{source}/{index}".encode(), digest_size=8).digest())


def sequence_id(request_id: str, index: int) -> str:
    """Id of one of a request's n sequences inside the engine."""
    return f"{request_id}#{index}"


def sequence_index(key: str) -> int:
    """Which of its request's sequences an id of `sequence_id` names."""
    return int(key.rpartition("#")[2])


def _token_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
        raise RequestError("prompt token ids must be a list of integers", param="prompt")
    return tuple(ids)
