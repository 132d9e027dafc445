"""Log probabilities of prompt tokens: made on the device, a few rows at a time, and read once they are on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.contract.request import ScheduledRow, TokenLogprobs
from quire.engine.rows import RowTable
from quire.sampling.logprobs import logprob_entries, logprob_figures

PIECE = 128
"""Rows whose full-vocabulary logits are held at once."""


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """Figures of a row's prompt log probabilities, on the device: `num_entries` with `count` alternatives each."""

    figures: Tensor
    num_entries: int
    count: int


def any_prompt_figures(rows: Sequence[ScheduledRow], table: RowTable) -> bool:
    """Whether a row asks for log probabilities of its prompt."""
    return any(table.rows[row.slot].new.params.prompt_logprobs is not None for row in rows)


def prompt_figures(
    rows: Sequence[ScheduledRow], hidden: Tensor, table: RowTable, logits: Callable[[Tensor], Tensor]
) -> dict[str, PromptFigures]:
    """By request id, for the rows that ask for them.

    Args:
        hidden: [T, H], the step's states. table: where the rows' tokens are.
        logits: of states, [R, H] -> [R, V].
    """
    found: dict[str, PromptFigures] = {}
    start = 0
    for row in rows:
        known = table.rows[row.slot].new
        wanted = known.params.prompt_logprobs
        first = row.num_computed_tokens
        count = min(row.num_new_tokens, known.num_prompt_tokens - 1 - first)
        if wanted is not None and count > 0:
            targets = table.token_ids[row.slot, first + 1 : first + 1 + count].long()
            figures = _figures(hidden[start : start + count], targets, wanted, logits)
            found[row.request_id] = PromptFigures(figures, count, wanted)
        start += row.num_new_tokens
    return found


def _figures(hidden: Tensor, targets: Tensor, count: int, logits: Callable[[Tensor], Tensor]) -> Tensor:
    pieces = zip(torch.split(hidden, PIECE), torch.split(targets, PIECE), strict=True)
    return torch.cat([logprob_figures(logits(piece), target, [count] * len(target)) for piece, target in pieces])


def prompt_entries(
    prompts: dict[str, PromptFigures], tensors: Iterable[Tensor]
) -> dict[str, tuple[TokenLogprobs, ...]]:
    """By request id, from the figures as the host's copy has brought them."""
    return {
        request_id: tuple(logprob_entries(figures, [prompt.count] * prompt.num_entries))
        for (request_id, prompt), figures in zip(prompts.items(), tensors, strict=False)
    }
