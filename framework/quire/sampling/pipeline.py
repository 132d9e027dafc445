"""Everything between a step's logits and its tokens, for the requests in their slots."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.contract.device import Ending
from quire.contract.request import TokenLogprobs
from quire.contract.sampling import (
    LogitsProcessor,
    ProcessorContext,
    ProcessorRequest,
    Sampler,
    SamplerInit,
    SamplingBatch,
    all_finite,
)
from quire.errors import PluginError, RequestError
from quire.outputs import NOT_FINITE
from quire.params import SamplingParams
from quire.sampling.logprobs import logprob_entries, logprob_figures

logger = logging.getLogger(__name__)

NOTHING_ALLOWED = "the request's token filters, biases and minimum length leave no token to sample"

# What stands in place of a token where there is none; token ids are not negative.
_NOT_FINITE, _NOTHING_ALLOWED = -1, -2
_REASONS = {_NOT_FINITE: NOT_FINITE, _NOTHING_ALLOWED: NOTHING_ALLOWED}


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was sampled, on the host: a token, log probabilities if asked for, and what went wrong, per row."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[str | None]

    def rows(self) -> Iterator[tuple[int, TokenLogprobs | None, str | None]]:
        """Row by row."""
        return zip(self.token_ids, self.logprobs, self.errors, strict=True)


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """What was sampled, on the device; nothing here has waited for it.

    Attributes:
        token_ids: int32 [R]; always within the vocabulary.
        outcome: int32 [R]; the token's id, or a negative code of what is wrong with the row.
        figures: float64, of the rows `wanted`, with counts[i] alternatives; None if nobody asked.
        failed: what the host knows to have gone wrong, per row.
    """

    token_ids: Tensor
    outcome: Tensor
    figures: Tensor | None
    wanted: tuple[int, ...]
    counts: tuple[int, ...]
    failed: tuple[str | None, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """What `read` needs on the host."""
        return (self.outcome,) if self.figures is None else (self.outcome, self.figures)

    def read(self, tensors: Sequence[Tensor]) -> SampledRows:
        """The rows, from copies of `tensors()` on the host."""
        outcome: list[int] = tensors[0].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(outcome)
        if self.figures is not None:
            for row, entry in zip(self.wanted, logprob_entries(tensors[1], self.counts), strict=True):
                logprobs[row] = entry
        errors: list[str | None] = list(self.failed)
        if min(outcome, default=0) < 0:
            errors = [known or _REASONS.get(code) for code, known in zip(outcome, self.failed, strict=True)]
        return SampledRows(outcome, logprobs, errors)


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """A `SamplingBatch` on the host: arrays [R] in place of tensors."""

    NUM_BYTES: ClassVar[int] = 32
    """Of a row."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.int64]
    positions: NDArray[np.int64]

    def batch(self, to_device: Callable[[NDArray[Any]], Tensor]) -> SamplingBatch:
        """The batch. `to_device`: puts an array there."""
        return SamplingBatch(
            temperature=to_device(self.temperature),
            top_k=to_device(self.top_k),
            top_p=to_device(self.top_p),
            min_p=to_device(self.min_p),
            seeds=to_device(self.seeds),
            positions=to_device(self.positions),
            all_greedy=not self.temperature.any(),
            any_top_k=bool(self.top_k.any()),
            any_top_p=bool((self.top_p < 1).any()),
            any_min_p=bool(self.min_p.any()),
        )


def greedy_columns(num_rows: int) -> SamplingColumns:
    """Of rows that are all greedy."""
    none, off = np.zeros(num_rows, dtype=np.float32), np.zeros(num_rows, dtype=np.int64)
    return SamplingColumns(none, off.astype(np.int32), np.ones(num_rows, dtype=np.float32), none, off, off)


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
        self._chooses: set[Ending] = set()  # endings for which the sampler chooses
        self._watched: set[int] = set()  # slots whose logits others than the sampler look at
        count = init.max_num_reqs
        self._temperature = np.zeros(count, dtype=np.float32)
        self._top_k = np.zeros(count, dtype=np.int32)
        self._top_p = np.ones(count, dtype=np.float32)
        self._min_p = np.zeros(count, dtype=np.float32)
        self._seeds = np.zeros(count, dtype=np.uint64)
        self._signed_seeds = self._seeds.view(np.int64)
        self._num_logprobs: dict[int, int] = {}
        self._host_tokens: dict[int, list[int]] = {}

    def add(self, slot: int, request: ProcessorRequest, seed: int) -> None:
        """A request takes the slot."""
        params = request.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(0, min(params.top_k, np.iinfo(np.int32).max))
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = seed
        if params.logprobs is not None or params.prompt_logprobs is not None:
            self._watched.add(slot)
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            try:
                if processor.add(slot, request):
                    active.add(slot)
                    if params.temperature > 0 or not processor.argmax_invariant:
                        self._watched.add(slot)
                    if processor.needs_host_tokens(params):
                        self._host_tokens[slot] = list(request.token_ids)
            except Exception as error:
                self._fail([slot], name, error)

    def remove(self, slot: int) -> None:
        """The slot is free again."""
        self._num_logprobs.pop(slot, None)
        self._failed.pop(slot, None)
        self._watched.discard(slot)
        self._host_tokens.pop(slot, None)
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            if slot in active:
                active.discard(slot)
                try:
                    processor.remove(slot)
                except Exception:
                    logger.warning("logits processor %r failed to give up a slot", name, exc_info=True)

    def told(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """The host has learnt the slots' newest tokens."""
        if not self._host_tokens:
            return
        for slot, token in zip(slots, tokens, strict=True):
            if slot in self._host_tokens:
                self._host_tokens[slot].append(token)

    def ending(self, slots: Sequence[int]) -> Ending:
        """How far the work of a step in which these slots' rows sample can go, as in `GraphKey`.

        To the hidden states alone until the sampler has shown that it chooses from the model's logits.
        """
        if not self._chooses or not self._watched.isdisjoint(slots):
            return "hidden"
        ending = _ending(all_greedy=not any(self._temperature[slot] > 0 for slot in slots))
        return ending if ending in self._chooses else "hidden"

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """int32 [R]: tokens of rows that nobody watches, -1 where logits [R, V] are not finite."""
        return self._chosen(self._sampler.choose(logits, batch), "choose", logits)

    def fill(self, columns: SamplingColumns, slots: list[int], num_tokens: list[int]) -> None:
        """As `columns`, of few rows, into arrays that are there; rows of padding are like the first."""
        padding = len(columns.positions) - len(slots)
        rows = zip([*slots, *slots[:1] * padding], [*num_tokens, *num_tokens[:1] * padding], strict=True)
        for at, (slot, position) in enumerate(rows):
            columns.temperature[at], columns.top_k[at] = self._temperature[slot], self._top_k[slot]
            columns.top_p[at], columns.min_p[at] = self._top_p[slot], self._min_p[slot]
            columns.seeds[at], columns.positions[at] = self._signed_seeds[slot], position

    def columns(self, slots: Sequence[int], num_tokens: Sequence[int]) -> SamplingColumns:
        """The sampler's parameters for these rows; `num_tokens` are the positions of the tokens to be sampled."""
        index = np.asarray(slots, dtype=np.int64)
        return SamplingColumns(
            temperature=self._temperature[index],
            top_k=self._top_k[index],
            top_p=self._top_p[index],
            min_p=self._min_p[index],
            seeds=self._signed_seeds[index],
            positions=np.asarray(num_tokens, dtype=np.int64),
        )

    def run(
        self, logits: Tensor, slots: Sequence[int], num_tokens: Sequence[int], token_ids: Tensor, batch: SamplingBatch
    ) -> SamplingResult:
        """Sample one token per row. The host does not wait, unless a processor or the sampler does.

        Args:
            logits: [R, V] of a floating dtype; may be overwritten.
            slots: slot of each row.
            num_tokens: tokens known of each row's request; the position of the token to be sampled.
            token_ids: int32 [max_num_reqs, L], the known tokens of every slot.
            batch: `columns` of the same rows, on the device.
        """
        wanted = tuple(row for row, slot in enumerate(slots) if slot in self._num_logprobs)
        turns = self._turns(slots)
        if not wanted and not turns and (tokens := self._sampler.choose(logits, batch)) is not None:
            self._chooses.add(_ending(all_greedy=batch.all_greedy))
            return self._result(self._chosen(tokens, "choose", logits), logits, slots)
        logits = logits.float()
        finite = all_finite(logits)
        chosen = self._index(wanted) if wanted else None
        raw = None if chosen is None else logits.index_select(0, chosen)  # a copy: the processors come next
        self._process(turns, logits, slots, num_tokens, token_ids)
        # A row that lost every token to the processors has failed, for whatever it draws is forbidden.
        empty = logits.amax(-1) == -math.inf if turns else None
        tokens = self._chosen(self._sampler.sample(logits, batch), "sample", logits)
        outcome = torch.where(finite, tokens, _NOT_FINITE)
        if empty is not None:
            outcome = torch.where(finite & empty, _NOTHING_ALLOWED, outcome)
        result = self._result(outcome, logits, slots)
        if raw is None or chosen is None:
            return result
        counts = tuple(self._num_logprobs[slots[row]] for row in wanted)
        figures = logprob_figures(raw, result.token_ids.index_select(0, chosen).long(), counts)
        return replace(result, figures=figures, wanted=wanted, counts=counts)

    def _chosen(self, tokens: object, method: str, logits: Tensor) -> Tensor:
        """What the sampler gave for each row, int32 [R]. Raises PluginError if that is something else."""
        if not isinstance(tokens, Tensor) or tokens.shape != logits.shape[:1]:
            what = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise PluginError(f"{type(self._sampler).__name__}.{method} returned {what}; token ids [R] are needed")
        return tokens.to(torch.int32)

    def _result(self, outcome: Tensor, logits: Tensor, slots: Sequence[int]) -> SamplingResult:
        # The next step reads the token, whatever is wrong with the row.
        tokens = outcome.clamp(0, logits.shape[1] - 1)
        return SamplingResult(tokens, outcome, None, (), (), tuple(self._failed.get(slot) for slot in slots))

    def _index(self, rows: Sequence[int]) -> Tensor:
        """Row numbers on the device; not waited for, as indexing by a list would."""
        return torch.tensor(rows, dtype=torch.int64).to(self._device, non_blocking=True)

    def _turns(self, slots: Sequence[int]) -> list[tuple[str, LogitsProcessor, list[int]]]:
        """The processors that have something to do, with the rows that they do it to."""
        turns = []
        for (name, processor), active in zip(self._processors, self._active, strict=True):
            rows = [row for row, slot in enumerate(slots) if slot in active]
            if processor.argmax_invariant:  # a greedy row's token would stay the same
                rows = [row for row in rows if self._temperature[slots[row]] > 0]
            if rows:
                turns.append((name, processor, rows))
        return turns

    def _process(
        self,
        turns: Sequence[tuple[str, LogitsProcessor, list[int]]],
        logits: Tensor,
        slots: Sequence[int],
        num_tokens: Sequence[int],
        token_ids: Tensor,
    ) -> None:
        """Have the processors edit the logits, except those of requests that have failed."""
        for name, processor, having in turns:
            rows = [row for row in having if slots[row] not in self._failed]
            if not rows:
                continue
            chosen = [slots[row] for row in rows]
            known = [self._host_tokens.get(slot, ()) for slot in chosen] if self._host_tokens else []
            ctx = ProcessorContext(chosen, [num_tokens[row] for row in rows], token_ids, known)
            try:
                if len(rows) == len(slots):
                    processor.apply(logits, ctx)
                else:
                    index = self._index(rows)
                    part = logits.index_select(0, index)
                    processor.apply(part, ctx)
                    logits.index_copy_(0, index, part)
            except Exception as error:
                self._fail(chosen, name, error)

    def _fail(self, slots: Sequence[int], name: str, error: Exception) -> None:
        """A processor that raises fails the requests that it was asked for, and no others."""
        logger.warning("logits processor %r failed", name, exc_info=error)
        for slot in slots:
            self._watched.add(slot)
            self._failed[slot] = f"logits processor {name!r} failed: {type(error).__name__}: {error}"


def _ending(*, all_greedy: bool) -> Ending:
    return "greedy" if all_greedy else "drawn"


def chosen_result(tokens: Tensor, count: int) -> SamplingResult:
    """The first `count` of what `SamplingPipeline.choose` gave, whose tokens have been stored already."""
    outcome = tokens if len(tokens) == count else tokens[:count]
    return SamplingResult(outcome, outcome, None, (), (), (None,) * count)


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
