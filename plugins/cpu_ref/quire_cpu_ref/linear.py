"""Linear layers: plain, packed for oneDNN, and independent of the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quire.plugin import LinearSpec
from torch import Tensor
from torch.nn import functional

TILE = 16
"""Rows of every multiplication of the deterministic form; see `DeterministicLinear`."""
PACK_ROWS = 16
"""Batch size that oneDNN is told to choose its weight layout for."""


@dataclass(frozen=True, slots=True)
class LinearState:
    """A weight as its kernel wants it, and the bias [N] or None."""

    weight: Tensor
    bias: Tensor | None


class TorchLinear:
    """`torch.nn.functional.linear`."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        return LinearState(weight.contiguous(), bias)

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        return functional.linear(x, state.weight, state.bias)


class PackedLinear:
    """oneDNN's blocked weight layout, which spares a reorder in every call."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        return LinearState(packed, bias)

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.spec.out_features)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), state.weight, state.bias, "none", [], "")
        return result


class DeterministicLinear:
    """Multiplies 16 rows at a time, so that a row's sum is taken in one order whatever stands beside it."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        return LinearState(weight.contiguous(), bias)

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        num_rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -num_rows % TILE))
        out = x.new_empty(padded.shape[0], self.spec.out_features)
        for start in range(0, padded.shape[0], TILE):
            # A fresh tile each time: kernels may also choose by the alignment of their operands.
            tile = padded[start : start + TILE].clone()
            out[start : start + TILE] = functional.linear(tile, state.weight, state.bias)
        return out[:num_rows]


def packs_well(spec: LinearSpec, device: torch.device) -> bool:
    """Whether packing is possible here and pays: bfloat16 on a CPU that computes it natively."""
    return device.type == "cpu" and spec.dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
