"""Exclude Top Choices (XTC, P. E. Weidmann 2024): now and then the most likely tokens are taken out of the draw.

Where several tokens are each as likely as `threshold`, all of them but the least likely are removed with
`probability`. Text becomes less predictable and stays sensible, as a token that is likely enough remains. With
the default probability of 0 this is an ordinary sampler: temperature, then top-k, top-p and min-p, then XTC.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import Sampler, SamplerInit, SamplingBatch, seeded_uniform
from torch import Tensor

COIN = 0x585443
"""Changes a seed for the coin, so that it falls independently of the draw."""


class XtcOptions(BaseModel):
    """What stands under `plugins.options.xtc` in the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """How often top choices are excluded; 0: never."""
    threshold: float = Field(default=0.1, gt=0.0, le=0.5)
    """Probability from which on a token is a top choice; above one half there can be only one."""


class XtcSampler(Sampler):
    """See the module's docstring. Greedy rows stay greedy."""

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        options = init.options or XtcOptions()
        self._probability: float = options.probability
        self._threshold: float = options.threshold

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        tokens = logits.argmax(-1)
        if batch.all_greedy:
            return tokens
        draws = seeded_uniform(batch.seeds, batch.positions)
        coins = (seeded_uniform(batch.seeds ^ COIN, batch.positions) < self._probability).tolist()
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p)
        for row, (temperature, top_k, top_p, min_p) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if temperature > 0:
                weights, order = candidates(logits[row], temperature, top_k, top_p, min_p)
                if coins[row]:
                    weights = exclude_top_choices(weights, self._threshold)
                tokens[row] = order[draw(weights, draws[row])]
        return tokens


def exclude_top_choices(weights: Tensor, threshold: float) -> Tensor:
    """Weights [V] in falling order, with 0 for those that are as likely as `threshold` but for the last of them."""
    count = int((weights >= threshold * weights.sum()).sum())
    if count < 2:
        return weights
    return torch.cat([torch.zeros_like(weights[: count - 1]), weights[count - 1 :]])


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(weights, 0 for what is cut off; token ids) of logits [V], most likely first; equals stand or fall together."""
    weights, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    if 0 < top_k < len(weights):
        weights = weights.masked_fill(weights < weights[top_k - 1], 0.0)
    if top_p < 1:
        mass = weights.cumsum(-1)
        last = torch.searchsorted(mass, mass[-1] * top_p).clamp(max=len(weights) - 1)
        weights = weights.masked_fill(weights < weights[last], 0.0)
    if min_p > 0:
        weights = weights.masked_fill(weights < min_p * weights[0], 0.0)
    return weights, order


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The index whose stretch of the cumulative weights holds u, which is uniform in [0, 1)."""
    mass = weights.cumsum(-1)
    index = torch.searchsorted(mass, u * mass[-1], right=True)
    return torch.minimum(index, weights.nonzero()[-1, 0])  # rounding may push it behind the last candidate
