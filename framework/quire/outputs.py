"""What callers get back. Names and shapes follow vLLM's, so that a user's script moves over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability at one position.

    Attributes:
        logprob: natural logarithm, before penalties, temperature and truncation.
        rank: 1 for the most likely token; None where it was not counted.
        decoded_token: the token as text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


NOT_FINITE = "the model's logits for this request are not finite"
"""The error of a request whose logits held NaN or were infinite: of the model or the device, not of the request."""

PositionLogprobs = dict[int, Logprob]
"""Token id -> log probability: the token that stands there, and the most likely ones."""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one step added to one sequence of a request. Streams are made of these.

    Attributes:
        request_id: the request.
        index: which of its n sequences.
        text: new text; what may be half a character or the start of a stop string is held back.
        token_ids: new token ids.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: entries for further prompt positions, if asked for.
        finish_reason: `stop`, `length`, `abort` or `error` on the sequence's last delta, else None.
        stop_reason: the stop string or stop token that ended it, None for the model's own end token.
        finished: True on the request's last delta, and only there.
        num_prompt_tokens: length of the prompt.
        num_cached_tokens: how many prompt tokens were found in the prefix cache.
        error: why, for finish reason `error`.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    finished: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and what it has produced so far.

    `prompt_logprobs` has one entry per prompt token, the first of them None, if asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0

    @classmethod
    def begin(
        cls, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], n: int, *, prompt_logprobs: bool
    ) -> RequestOutput:
        """An output to which nothing has been added yet."""
        return cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[CompletionOutput(index) for index in range(n)],
            prompt_logprobs=[None] if prompt_logprobs else None,
        )

    def add(self, delta: OutputDelta) -> None:
        """Append one delta of this request; deltas must come in order."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + list(delta.logprobs)
            chosen = sum(entry[token].logprob for token, entry in zip(delta.token_ids, delta.logprobs, strict=True))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen
        if self.prompt_logprobs is not None and delta.index == 0:
            self.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            output.error = delta.error
        self.num_cached_tokens = delta.num_cached_tokens
        self.finished = delta.finished
