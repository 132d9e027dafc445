"""Log probabilities of tokens, with rank and the most likely alternatives.

Figures are computed on the device, and become entries when they have arrived on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.contract.request import TokenLogprobs


def logprob_figures(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """What `logprob_entries` reads: float64, one vector for all rows.

    Args:
        logits: [R, V] of a floating dtype. targets: int64 [R].
        counts: alternatives wanted of each row.

    Each row is normalised on its own, so that its figures do not depend on its neighbours. A row is its
    target, the target's log probability and rank, then the ids and the log probabilities of the most likely
    tokens; float64 holds ids exactly.
    """
    rows = [_figures(row, target, count) for row, target, count in zip(logits, targets, counts, strict=True)]
    return torch.cat(rows)


def logprob_entries(figures: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """One entry per row, from figures that are on the host."""
    values: list[float] = figures.tolist()
    entries, at = [], 0
    for count in counts:
        target, logprob, rank = values[at : at + 3]
        ids, end = values[at + 3 : at + 3 + count], at + 3 + 2 * count
        top = tuple(values[at + 3 + count : end])
        entries.append(TokenLogprobs(int(target), logprob, int(rank), tuple(int(token) for token in ids), top))
        at = end
    return entries


def _figures(logits: Tensor, target: Tensor, count: int) -> Tensor:
    logprobs = logits.double() - torch.logsumexp(logits.double(), -1)
    chosen = logprobs.gather(0, target[None])[0]  # indexing by a tensor would wait for its value
    rank = (logprobs > chosen).sum() + 1
    own = torch.stack((target.double(), chosen, rank.double()))
    if not count:
        return own
    top = logprobs.topk(count)
    return torch.cat((own, top.indices.double(), top.values))
