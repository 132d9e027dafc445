"""Log probabilities of tokens, with rank and the most likely alternatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.contract.request import TokenLogprobs


def token_logprobs(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """One entry per row of logits float32 [R, V], for targets int64 [R], with counts[i] alternatives.

    Each row is normalised on its own, so that its figures do not depend on its neighbours.
    """
    return [_entry(row, target, count) for row, target, count in zip(logits, targets, counts, strict=True)]


def _entry(logits: Tensor, target: Tensor, count: int) -> TokenLogprobs:
    logprobs = logits.double() - torch.logsumexp(logits.double(), -1)
    chosen = logprobs[target]
    rank = int((logprobs > chosen).sum()) + 1
    top = logprobs.topk(count) if count else None
    return TokenLogprobs(
        token_id=int(target),
        logprob=float(chosen),
        rank=rank,
        top_ids=tuple(top.indices.tolist()) if top else (),
        top_logprobs=tuple(top.values.tolist()) if top else (),
    )
