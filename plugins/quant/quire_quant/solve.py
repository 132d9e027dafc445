"""Choosing codes for a weight: rounding, GPTQ, and AWQ's scales, from the second moment of the layer's inputs.

GPTQ: https://arxiv.org/abs/2210.17323, here with groups fixed beforehand and columns in order of activation,
which is as exact as groups that follow that order and needs no index of groups. AWQ: https://arxiv.org/abs/2306.00978,
here with the layer's own output error, tr(D H Dᵀ), in place of runs of the whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_quant.codes import weight_of

COLUMNS = 128
"""Columns whose error is carried on among themselves before it reaches the rest."""
DAMPING_STEP = 0.01
AWQ_STEPS = 20
SHRINK = tuple(1 - 0.05 * step for step in range(10))
SMALLEST_SCALE = 2.0**-24
"""The smallest number of float16, in which scales are stored."""


@dataclass(frozen=True, slots=True)
class Target:
    """What codes are wanted: bits of each, inputs that share a scale, and whether zero points stay in the middle."""

    bits: int
    group_size: int
    sym: bool

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class Solution:
    """codes uint8 [N, K]; scales float16 [N, G]; zeros uint8 [N, G]."""

    target: Target
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def weight(self) -> Tensor:
        """The weight that they mean, float32 [N, K]."""
        return weight_of(self.codes, self.scales.float(), self.zeros.float(), self.target.group_size)


def grid(weight: Tensor, target: Target, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scales and zeros float32 [N, G] that span each group of weight [N, K], or `shrink` of it.

    Scales are rounded to float16, as they are stored.
    """
    groups = weight.view(len(weight), -1, target.group_size)
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    if target.sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / target.largest).clamp(min=SMALLEST_SCALE).half().float()
    if target.sym:
        return scales, torch.full_like(scales, float(1 << (target.bits - 1)))
    return scales, (-low / scales).round().clamp(0, target.largest)


def round_to_nearest(weight: Tensor, target: Target, scales: Tensor, zeros: Tensor) -> Solution:
    """The nearest code for each weight [N, K]."""
    groups = weight.view(len(weight), -1, target.group_size)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, target.largest)
    return Solution(target, codes.view_as(weight).to(torch.uint8), scales.half(), zeros.to(torch.uint8))


def output_error(weight: Tensor, solved: Tensor, moment: Tensor) -> float:
    """Error of the layer's output relative to the output, both as root mean squares over the inputs of `moment`."""
    change = solved - weight
    lost, whole = ((matrix @ moment * matrix).sum() for matrix in (change, weight))
    return float((lost.clamp(min=0) / whole.clamp(min=1e-30)).sqrt())


def gptq(weight: Tensor, moment: Tensor, target: Target, damping: float = 0.01) -> Solution:
    """Codes for weight float32 [N, K]; each column's error is made up for by the columns after it.

    Args:
        moment: XᵀX [K, K] of the layer's inputs, up to a factor.
        damping: share of the mean of its diagonal that is added to it.
    """
    scales, zeros = grid(weight, target)
    diagonal = moment.diagonal()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True)
    work = weight.masked_fill(dead, 0.0)[:, order]
    upper = _inverse_factor(moment + torch.diag(dead.float()), order, damping)
    group_of = order // target.group_size
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], COLUMNS):
        end = min(start + COLUMNS, work.shape[1])
        errors = torch.empty_like(work[:, start:end])
        for column in range(start, end):
            scale, zero = scales[:, group_of[column]], zeros[:, group_of[column]]
            code = ((work[:, column] / scale).round() + zero).clamp(0, target.largest)
            error = (work[:, column] - (code - zero) * scale) / upper[column, column]
            work[:, column:end] -= error[:, None] * upper[column, column:end]
            codes[:, column], errors[:, column - start] = code, error
        work[:, end:] -= errors @ upper[start:end, end:]
    natural = torch.empty_like(codes).index_copy_(1, order, codes)
    return Solution(target, natural.to(torch.uint8), scales.half(), zeros.to(torch.uint8))


def _inverse_factor(moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, rows and columns in that order."""
    ordered = moment[order][:, order]
    step = ordered.diagonal().mean()
    while True:
        damped = ordered + torch.eye(len(ordered)) * damping * step
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping += DAMPING_STEP


def awq_scale(weights: Sequence[Tensor], moment: Tensor, magnitude: Tensor, target: Target) -> Tensor:
    """Factors [K] by which inputs are divided and weights multiplied before they are rounded.

    Args:
        weights: of the layers that share the inputs, each [N, K].
        moment: XᵀX [K, K] of the inputs. magnitude: mean of |X| [K].
    """
    stacked = torch.cat(list(weights))
    groups = stacked.abs().view(len(stacked), -1, target.group_size)
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).view_as(stacked).mean(0)
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(AWQ_STEPS + 1):
        ratio = step / AWQ_STEPS
        scale = (magnitude.pow(ratio) / (share.pow(1 - ratio) + 1e-4)).clamp(min=1e-4) if step else best
        scale = scale / (scale.max() * scale.min()).sqrt()
        change = round_to_nearest(stacked * scale, target, *grid(stacked * scale, target)).weight() / scale - stacked
        loss = float((change @ moment * change).sum())
        if loss < least:
            best, least = scale, loss
    return best


def clipped(weight: Tensor, moment: Tensor, target: Target) -> Solution:
    """Rounded with each group's range shrunk by up to 45 %, whichever loses least of the group's own output."""
    rows, size = len(weight), target.group_size
    blocks = torch.stack([moment[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    whole = torch.ones(rows, weight.shape[1] // size)
    best, least = whole, torch.full_like(whole, float("inf"))
    for shrink in SHRINK:
        solved = round_to_nearest(weight, target, *grid(weight, target, shrink)).weight()
        change = (solved - weight).view(rows, -1, size).transpose(0, 1)  # [G, N, size]
        loss = ((change @ blocks) * change).sum(-1).t()
        better = loss < least
        best, least = torch.where(better, whole * shrink, best), torch.where(better, loss, least)
    return round_to_nearest(weight, target, *grid(weight, target, best))
