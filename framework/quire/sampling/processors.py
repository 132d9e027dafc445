"""The built-in logits processors. Each keeps state per slot and touches only the rows that asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quire.contract.sampling import LogitsProcessor, ProcessorContext, ProcessorRequest, SamplerInit
from quire.errors import RequestError
from quire.params import SamplingParams

NEGATIVE_INFINITY = float("-inf")


class TokenFilter(LogitsProcessor):
    """`allowed_token_ids` and `bad_token_ids`."""

    conformance = MappingProxyType(
        {
            "active_params": (
                SamplingParams(allowed_token_ids=(1, 5, 9), bad_token_ids=(5,)),
                SamplingParams(bad_token_ids=(0, 31)),
            )
        }
    )

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        self._forbidden: dict[int, Tensor] = {}

    @classmethod
    def validate(cls, params: SamplingParams, vocab_size: int) -> None:
        check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
        check_ids("bad_token_ids", params.bad_token_ids, vocab_size)
        if params.allowed_token_ids is not None and not set(params.allowed_token_ids) - set(params.bad_token_ids):
            raise RequestError("bad_token_ids forbids every token of allowed_token_ids", param="bad_token_ids")

    def add(self, slot: int, request: ProcessorRequest) -> bool:
        params = request.params
        if params.allowed_token_ids is None and not params.bad_token_ids:
            return False
        forbidden = torch.full((self.init.vocab_size,), params.allowed_token_ids is not None, device=self.init.device)
        forbidden[list(params.allowed_token_ids or ())] = False
        forbidden[list(params.bad_token_ids)] = True
        self._forbidden[slot] = forbidden
        return True

    def remove(self, slot: int) -> None:
        del self._forbidden[slot]

    def apply(self, logits: Tensor, ctx: ProcessorContext) -> None:
        logits.masked_fill_(torch.stack([self._forbidden[slot] for slot in ctx.slots]), NEGATIVE_INFINITY)


class LogitBias(LogitsProcessor):
    """`logit_bias`: a constant added to the logits of single tokens."""

    conformance = MappingProxyType(
        {"active_params": (SamplingParams(logit_bias={0: 5.0, 31: -3.5}), SamplingParams(logit_bias={7: 100.0}))}
    )

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def validate(cls, params: SamplingParams, vocab_size: int) -> None:
        check_ids("logit_bias", tuple(params.logit_bias or ()), vocab_size)

    def add(self, slot: int, request: ProcessorRequest) -> bool:
        bias = request.params.logit_bias
        if not bias:
            return False
        ids = torch.tensor(list(bias), device=self.init.device)
        self._biases[slot] = (ids, torch.tensor(list(bias.values()), dtype=torch.float32, device=self.init.device))
        return True

    def remove(self, slot: int) -> None:
        del self._biases[slot]

    def apply(self, logits: Tensor, ctx: ProcessorContext) -> None:
        for row, slot in enumerate(ctx.slots):
            ids, values = self._biases[slot]
            logits[row].index_add_(0, ids, values)


@dataclass(frozen=True, slots=True)
class _Minimum:
    """Until the request has this many tokens in all, the stop tokens are masked."""

    num_tokens: int
    stop_ids: Tensor


class MinTokens(LogitsProcessor):
    """`min_tokens`: no stop token before that many output tokens."""

    conformance = MappingProxyType({"active_params": (SamplingParams(min_tokens=1), SamplingParams(min_tokens=5))})

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        self._minima: dict[int, _Minimum] = {}

    def add(self, slot: int, request: ProcessorRequest) -> bool:
        if not request.params.min_tokens or not request.stop_token_ids:
            return False
        stop_ids = torch.tensor(sorted(request.stop_token_ids), device=self.init.device)
        self._minima[slot] = _Minimum(request.num_prompt_tokens + request.params.min_tokens, stop_ids)
        return True

    def remove(self, slot: int) -> None:
        del self._minima[slot]

    def apply(self, logits: Tensor, ctx: ProcessorContext) -> None:
        for row, (slot, known) in enumerate(zip(ctx.slots, ctx.num_tokens, strict=True)):
            minimum = self._minima[slot]
            # `known` tokens precede the one to be sampled, which would be number known + 1.
            if known + 1 <= minimum.num_tokens:
                logits[row].index_fill_(0, minimum.stop_ids, NEGATIVE_INFINITY)


@dataclass(slots=True)
class _Counts:
    """How often each token was seen in the output, and whether in the prompt; up to `num_tokens`."""

    params: SamplingParams
    output: Tensor
    in_prompt: Tensor
    num_tokens: int


class Penalties(LogitsProcessor):
    """Repetition (Keskar et al. 2019), then frequency, then presence (OpenAI's definition)."""

    conformance = MappingProxyType(
        {
            "active_params": (
                SamplingParams(repetition_penalty=1.4),
                SamplingParams(frequency_penalty=0.7, presence_penalty=-0.3),
                SamplingParams(repetition_penalty=0.8, frequency_penalty=-0.5, presence_penalty=1.0),
            )
        }
    )

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        self._counts: dict[int, _Counts] = {}

    def add(self, slot: int, request: ProcessorRequest) -> bool:
        params = request.params
        if params.repetition_penalty == 1.0 and not params.frequency_penalty and not params.presence_penalty:
            return False
        output = torch.zeros(self.init.vocab_size, dtype=torch.float32, device=self.init.device)
        in_prompt = torch.zeros(self.init.vocab_size, dtype=torch.bool, device=self.init.device)
        known = torch.tensor(tuple(request.token_ids), device=self.init.device)
        in_prompt[known[: request.num_prompt_tokens]] = True
        _count(output, known[request.num_prompt_tokens :])
        self._counts[slot] = _Counts(params, output, in_prompt, known.numel())
        return True

    def remove(self, slot: int) -> None:
        del self._counts[slot]

    def apply(self, logits: Tensor, ctx: ProcessorContext) -> None:
        for row, (slot, known) in enumerate(zip(ctx.slots, ctx.num_tokens, strict=True)):
            counts = self._counts[slot]
            _count(counts.output, ctx.token_ids[slot, counts.num_tokens : known].long())
            counts.num_tokens = known
            _penalise(logits[row], counts)


def _penalise(logits: Tensor, counts: _Counts) -> None:
    params, seen_in_output = counts.params, counts.output > 0
    if params.repetition_penalty != 1.0:
        seen = seen_in_output | counts.in_prompt
        factor = params.repetition_penalty
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits))
    if params.frequency_penalty:
        logits.sub_(params.frequency_penalty * counts.output)
    if params.presence_penalty:
        logits.sub_(params.presence_penalty * seen_in_output.float())


def _count(output: Tensor, token_ids: Tensor) -> None:
    output.index_add_(0, token_ids, torch.ones(token_ids.numel(), dtype=output.dtype, device=output.device))


def check_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise RequestError for a token id outside the vocabulary."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{field} has token id {token}; ids run from 0 to {vocab_size - 1}", param=field)
