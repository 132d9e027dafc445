"""From logits to tokens: logits processors edit, one sampler chooses.

Order of a step, for logits [R, V] of the rows that need a token, widened to float32:
 1. raw log probabilities are taken here, if a row asked for any;
 2. processors apply in place: allowed and bad tokens, logit bias, minimum tokens, penalties,
    then those of plugins;
 3. the sampler divides by temperature, truncates (top-k, top-p, min-p), draws.
If nothing but the sampler looks at the logits, its `choose` does it all, if it has one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplerInit:
    """All that a sampler or processor is constructed from.

    Attributes:
        device: where the logits live.
        vocab_size: V, the width of the logits.
        max_num_reqs: slots, and the largest R.
        options: the validated instance of `Provider.options`, or None.
    """

    device: torch.device
    vocab_size: int
    max_num_reqs: int
    options: Any = None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Per-row parameters, R rows. Tensors live on the device; the flags are host-side shortcuts.

    Attributes:
        temperature: float32 [R]; 0 is greedy.
        top_k: int32 [R]; 0 is off.
        top_p: float32 [R]; 1 is off.
        min_p: float32 [R]; 0 is off.
        seeds: int64 [R]; seed of each row's generator.
        positions: int64 [R]; position of the token to be sampled, counted from the prompt's start.
        all_greedy: every temperature is 0.
        any_top_k: some row truncates by top-k; likewise any_top_p, any_min_p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool


class Sampler(ABC):
    """Chooses a token per row. The draw depends on the row's logits, parameters, seed and position alone."""

    def __init__(self, init: SamplerInit) -> None:
        self.init = init

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Token ids int64 [R] from logits float32 [R, V], which may be overwritten."""

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor | None:
        """What `sample` gives, from a sampler that can do without having the logits widened, and copied, first.

        Args:
            logits: [R, V] of a floating dtype, as the model computed them; not to be written.
            batch: as for `sample`.

        Returns:
            int32 [R]: token ids; -1 for a row that has a value which is not finite. None, as by default: `sample`
            is to be asked. Whether it is None depends on the dtype and `batch.all_greedy` alone.
        """
        return None


def all_finite(logits: Tensor) -> Tensor:
    """bool [R]: whether all values of a row [R, V] are finite; no temporary of the logits' size."""
    # NaN passes through both, and is on neither side. On a CPU torch's aminmax takes ten times as long as the two.
    return (logits.amax(-1) < math.inf) & (logits.amin(-1) > -math.inf)


@dataclass(frozen=True, slots=True)
class ProcessorRequest:
    """What a processor learns of a request that takes a slot.

    Attributes:
        request_id: the request.
        params: its sampling parameters.
        token_ids: all tokens known so far, prompt first.
        num_prompt_tokens: how many of them are the prompt.
        stop_token_ids: tokens that end the output.
    """

    request_id: str
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """The rows of one call of `LogitsProcessor.apply`.

    Attributes:
        slots: the slot of each row, R of them.
        num_tokens: known tokens of each row's request, prompt and output.
        token_ids: int32 [max_num_reqs, max_model_len] on the device; row `slots[i]` begins with the
            `num_tokens[i]` tokens known so far. Read only. The newest may have been sampled by a step that the
            device has not finished, so reading it from the host would wait for that.
        host_token_ids: for a processor with `needs_host_tokens`: the same tokens of each row on the host
            (empty for rows that do not need them); else nothing at all.
    """

    slots: Sequence[int]
    num_tokens: Sequence[int]
    token_ids: Tensor
    host_token_ids: Sequence[Sequence[int]] = ()


class LogitsProcessor(ABC):
    """Edits logits before sampling. Keeps its state per slot; a request owns its slot until `remove`."""

    argmax_invariant: ClassVar[bool] = False
    """True if the most likely token never changes; such a processor is skipped for greedy rows."""

    extra_args: ClassVar[frozenset[str]] = frozenset()
    """Keys of `SamplingParams.extra_args` that this processor honours; keys that none honours are refused."""

    def __init__(self, init: SamplerInit) -> None:
        self.init = init

    @classmethod
    def needs_host_tokens(cls, params: SamplingParams) -> bool:
        """Whether, for a request with these parameters, `apply` needs the newest token's id on the host.

        Steps overlap: a step is launched while the one before it runs, whose tokens only the device knows.
        Tensor operations on `ProcessorContext.token_ids` need not care. A processor that follows the output
        in Python (a grammar, say) returns True here; its requests then take part only in steps that are
        launched after their last token has arrived, and it finds the tokens in `host_token_ids`.
        """
        return False

    @classmethod
    def validate(cls, params: SamplingParams, vocab_size: int) -> None:
        """Raise RequestError if the processor cannot honour these parameters."""

    @abstractmethod
    def add(self, slot: int, request: ProcessorRequest) -> bool:
        """A request takes the slot; returns whether this processor has anything to do for it."""

    def remove(self, slot: int) -> None:
        """The slot is free again. Called only for slots whose `add` returned True."""

    @abstractmethod
    def apply(self, logits: Tensor, ctx: ProcessorContext) -> None:
        """Edit logits float32 [R, V] in place. Called with the rows that are active here, and no others."""
