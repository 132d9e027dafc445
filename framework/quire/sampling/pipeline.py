"""Everything between a step's logits and its tokens, for the requests in their slots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.contract.request import TokenLogprobs
from quire.contract.sampling import (
    LogitsProcessor,
    ProcessorContext,
    ProcessorRequest,
    Sampler,
    SamplerInit,
    SamplingBatch,
)
from quire.errors import RequestError
from quire.params import SamplingParams
from quire.sampling.logprobs import token_logprobs

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's logits for this request are not finite"
NOTHING_ALLOWED = "the request's token filters, biases and minimum length leave no token to sample"


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """Token ids int64 [R] on the device; per row log probabilities if asked for, and what went wrong."""

    token_ids: Tensor
    logprobs: tuple[TokenLogprobs | None, ...]
    errors: tuple[str | None, ...]


class SamplingPipeline:
    """Holds each slot's parameters, runs the processors that are active, then the sampler.

    Args:
        sampler: chooses the tokens.
        processors: (name, processor), in the order in which they run.
        init: sizes and device.
    """

    def __init__(self, sampler: Sampler, processors: Sequence[tuple[str, LogitsProcessor]], init: SamplerInit) -> None:
        self._sampler = sampler
        self._processors = list(processors)
        self._device = init.device
        self._active: list[set[int]] = [set() for _ in processors]
        self._failed: dict[int, str] = {}
        count = init.max_num_reqs
        self._temperature = np.zeros(count, dtype=np.float32)
        self._top_k = np.zeros(count, dtype=np.int32)
        self._top_p = np.ones(count, dtype=np.float32)
        self._min_p = np.zeros(count, dtype=np.float32)
        self._seeds = np.zeros(count, dtype=np.uint64)
        self._num_logprobs: dict[int, int] = {}

    def add(self, slot: int, request: ProcessorRequest, seed: int) -> None:
        """A request takes the slot."""
        params = request.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(0, min(params.top_k, np.iinfo(np.int32).max))
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = seed
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            try:
                if processor.add(slot, request):
                    active.add(slot)
            except Exception as error:
                self._fail([slot], name, error)

    def remove(self, slot: int) -> None:
        """The slot is free again."""
        self._num_logprobs.pop(slot, None)
        self._failed.pop(slot, None)
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            if slot in active:
                active.discard(slot)
                try:
                    processor.remove(slot)
                except Exception:
                    logger.warning("logits processor %r failed to give up a slot", name, exc_info=True)

    def run(self, logits: Tensor, slots: Sequence[int], num_tokens: Sequence[int], token_ids: Tensor) -> SamplingResult:
        """Sample one token per row.

        Args:
            logits: float32 [R, V]; overwritten.
            slots: slot of each row.
            num_tokens: tokens known of each row's request; the position of the token to be sampled.
            token_ids: int32 [max_num_reqs, L], the known tokens of every slot.
        """
        # A row is finite if its extremes are (NaN passes through both); no temporary of the logits' size.
        finite = torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
        wanted = [row for row, slot in enumerate(slots) if slot in self._num_logprobs]
        raw = logits[wanted] if wanted else None  # a copy: the processors come next
        if self._process(logits, slots, num_tokens, token_ids):
            self._fail_empty(logits, finite, slots)
        tokens = self._sampler.sample(logits, self._batch(slots, num_tokens))
        return SamplingResult(tokens, self._logprobs(raw, wanted, slots, tokens), self._errors(finite, slots))

    def _process(self, logits: Tensor, slots: Sequence[int], num_tokens: Sequence[int], token_ids: Tensor) -> bool:
        """Run the active processors; whether there were any."""
        any_ran = False
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            rows = [row for row, slot in enumerate(slots) if slot in active and slot not in self._failed]
            if processor.argmax_invariant:  # a greedy row's token would stay the same
                rows = [row for row in rows if self._temperature[slots[row]] > 0]
            if not rows:
                continue
            any_ran = True
            chosen = [slots[row] for row in rows]
            ctx = ProcessorContext(chosen, [num_tokens[row] for row in rows], token_ids)
            try:
                if len(rows) == len(slots):
                    processor.apply(logits, ctx)
                else:
                    part = logits[rows]
                    processor.apply(part, ctx)
                    logits[rows] = part
            except Exception as error:
                self._fail(chosen, name, error)
        return any_ran

    def _fail_empty(self, logits: Tensor, finite: Tensor, slots: Sequence[int]) -> None:
        """A row that lost every token to the processors has failed, for whatever it draws is forbidden."""
        empty = finite & (logits == float("-inf")).all(-1)
        for row in empty.nonzero().flatten().tolist():
            self._failed.setdefault(slots[row], NOTHING_ALLOWED)

    def _fail(self, slots: Sequence[int], name: str, error: Exception) -> None:
        """A processor that raises fails the requests that it was asked for, and no others."""
        logger.warning("logits processor %r failed", name, exc_info=error)
        for slot in slots:
            self._failed[slot] = f"logits processor {name!r} failed: {type(error).__name__}: {error}"

    def _batch(self, slots: Sequence[int], num_tokens: Sequence[int]) -> SamplingBatch:
        index = np.asarray(slots)
        temperature, top_k = self._temperature[index], self._top_k[index]
        top_p, min_p = self._top_p[index], self._min_p[index]
        return SamplingBatch(
            temperature=torch.from_numpy(temperature).to(self._device),
            top_k=torch.from_numpy(top_k).to(self._device),
            top_p=torch.from_numpy(top_p).to(self._device),
            min_p=torch.from_numpy(min_p).to(self._device),
            seeds=torch.from_numpy(self._seeds[index].view(np.int64)).to(self._device),
            positions=torch.tensor(num_tokens, device=self._device),
            all_greedy=not temperature.any(),
            any_top_k=bool(top_k.any()),
            any_top_p=bool((top_p < 1).any()),
            any_min_p=bool(min_p.any()),
        )

    def _logprobs(
        self, raw: Tensor | None, wanted: Sequence[int], slots: Sequence[int], tokens: Tensor
    ) -> tuple[TokenLogprobs | None, ...]:
        found: list[TokenLogprobs | None] = [None] * len(slots)
        if raw is not None:
            counts = [self._num_logprobs[slots[row]] for row in wanted]
            for row, entry in zip(wanted, token_logprobs(raw, tokens[wanted], counts), strict=True):
                found[row] = entry
        return tuple(found)

    def _errors(self, finite: Tensor, slots: Sequence[int]) -> tuple[str | None, ...]:
        healthy = finite.tolist()
        return tuple(
            self._failed.get(slot) or (None if good else NOT_FINITE) for slot, good in zip(slots, healthy, strict=True)
        )


def prompt_logprobs(logits: Tensor, targets: Tensor, count: int) -> list[TokenLogprobs]:
    """Entries for prompt positions: logits float32 [T, V] predict targets int64 [T]."""
    return token_logprobs(logits, targets, [count] * targets.numel())


def validate_params(params: SamplingParams, vocab_size: int, processors: Sequence[type[LogitsProcessor]]) -> None:
    """Let every processor check the parameters, and refuse extra arguments that none of them honours."""
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise RequestError(
                f"stop_token_ids has token id {token}; ids run from 0 to {vocab_size - 1}", param="stop_token_ids"
            )
    for processor in processors:
        processor.validate(params, vocab_size)
    honoured = frozenset().union(*(processor.extra_args for processor in processors))
    if unknown := sorted(set(params.extra_args or ()) - honoured):
        raise RequestError(
            f"extra_args has {unknown}, which no logits processor honours",
            param="extra_args",
            remedy=f"known are {sorted(honoured)}" if honoured else "load the plugin with logits_processors",
        )
