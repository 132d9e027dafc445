"""The reference sampler: one draw per row, by inverse transform in vocabulary order.

The candidates of a row are defined without regard to order, so that sort-free kernels can agree:
  1. x = logit / temperature;
  2. top-k keeps every x at or above the k-th largest, ties included;
  3. top-p keeps, of those, every x at or above the largest threshold whose candidates hold mass p
     (probabilities renormalised over what top-k kept), ties included;
  4. min-p keeps, of those, every x whose probability is at least min_p times the largest.
The draw is the first candidate, in order of token ids, whose cumulative probability exceeds
u times the candidates' mass, u being the row's Philox draw. A greedy row takes the largest logit,
the lowest id of equals. Rows are computed one by one where several at once could differ in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.contract.sampling import Sampler, SamplerInit, SamplingBatch
from quire.sampling.philox import seeded_uniform

SORT_LIMIT = 1024
"""Up to this k the k-th value is selected, above it the row is sorted."""


class TorchSampler(Sampler):
    """See the module's docstring."""

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        tokens = logits.argmax(-1)
        if batch.all_greedy:
            return tokens
        draws = seeded_uniform(batch.seeds, batch.positions)
        rows = zip(
            batch.temperature.tolist(), batch.top_k.tolist(), batch.top_p.tolist(), batch.min_p.tolist(), strict=True
        )
        for row, (temperature, top_k, top_p, min_p) in enumerate(rows):
            if temperature > 0.0:
                weights = candidate_weights(logits[row], temperature, top_k, top_p, min_p)
                tokens[row] = draw(weights, draws[row])
        return tokens


def candidate_weights(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Unnormalised probabilities float64 [V] of one row [V]; 0 for tokens that are cut off."""
    # Divided in float64: a small temperature would overflow float32.
    scaled = logits.double() / temperature
    scaled = scaled - scaled.max()
    weights = scaled.exp()
    if 0 < top_k < logits.shape[0]:
        weights = weights.masked_fill(scaled < _kth_largest(scaled, top_k), 0.0)
    if top_p < 1.0:
        weights = weights.masked_fill(weights < _mass_threshold(weights, top_p), 0.0)
    if min_p > 0.0:
        weights = weights.masked_fill(weights < min_p, 0.0)  # the largest weight is exactly 1
    return weights


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The token whose stretch of the cumulative weights [V] holds u (float64, in [0, 1))."""
    cumulative = weights.cumsum(-1)
    token = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    # Rounding may push u times the mass onto the very end, behind the last candidate.
    last = weights.nonzero()[-1, 0]
    return torch.minimum(token, last)


def _kth_largest(scaled: Tensor, k: int) -> Tensor:
    if k <= SORT_LIMIT:
        return scaled.topk(k).values[-1]
    return scaled.sort(descending=True).values[k - 1]


def _mass_threshold(weights: Tensor, top_p: float) -> Tensor:
    """The largest weight t such that the candidates of weight >= t hold at least `top_p` of the mass."""
    cumulative = weights.cumsum(-1)
    goal = cumulative[-1] * top_p
    # Sorting the whole row is slow, and not needed: the V tokens below this bound hold less than
    # V · bound, half of the mass that is cut off, so the threshold lies above it.
    bound = (cumulative[-1] - goal) / (2 * weights.shape[0])
    ordered = weights[weights >= bound].sort(descending=True).values
    index = torch.searchsorted(ordered.cumsum(-1), goal)
    return ordered[index.clamp(max=ordered.shape[0] - 1)]
