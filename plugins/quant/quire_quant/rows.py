"""Multiplication by a weight that is made a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from quire.plugin import torch_linear
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 20
"""Elements of the weight that are made at once: a few MB, which the cache holds."""
TILE = 64
"""Rows of x in every multiplication on the CPU, so that a row does not see how many there are: to make the weight costs
more than to multiply so many rows by it."""


def chunk_rows(in_features: int) -> int:
    """Output rows that are made at once."""
    return max(16, CHUNK_ELEMENTS // in_features)


def multiply(
    x: Tensor, out_features: int, rows: Callable[[int, int], Tensor], bias: Tensor | None, *, deterministic: bool
) -> Tensor:
    """x [T, K] times the transpose of a weight [out_features, K], plus bias -> [T, out_features].

    Args:
        rows: first and last row (exclusive) -> these rows of the weight, in x's dtype.
        deterministic: a row's bits must not depend on how many rows there are; on the CPU they never do.
    """
    tiled = deterministic or x.device.type == "cpu"
    out = x.new_empty(x.shape[0], out_features)
    step = chunk_rows(x.shape[1])
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        part = None if bias is None else bias[start:end]
        weight = rows(start, end)
        out[:, start:end] = _tiled(x, weight, part) if tiled else torch_linear(x, weight, part)
    return out


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(weight))
    padded = functional.pad(x, (0, 0, 0, -x.shape[0] % TILE))
    tiles = [torch_linear(tile.clone(), weight, bias) for tile in torch.split(padded, TILE)]
    return torch.cat(tiles)[: x.shape[0]]
