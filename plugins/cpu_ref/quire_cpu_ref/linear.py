"""Linear layers: plain, packed for oneDNN, and independent of the number of rows.

Packing into oneDNN's blocked layout pays in bfloat16 (1.2 to 2.6 times `functional.linear` on Zen 4
for 1 to 32 rows, the same for 512) and in float32 (1.6 to 3.6 times, 2.3 for 512 rows).
`benchmarks/cpu_ref_micro.py` measures both.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from quire.plugin import LinearSpec, torch_linear
from torch import Tensor
from torch.nn import functional

TILE = 16
"""Rows of every multiplication of the deterministic form; see `DeterministicLinear`."""
PACK_ROWS = 16
"""Batch size that oneDNN is told to choose its weight layout for; it then takes any other as well."""


@dataclass(frozen=True, slots=True)
class LinearState:
    """A weight as its kernel wants it, and the bias [N] or None."""

    weight: Tensor
    bias: Tensor | None


class TorchLinear:
    """`torch.nn.functional.linear`, or what is faster than it."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        return LinearState(weight.contiguous(), bias)

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        return torch_linear(x, state.weight, state.bias)


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
        return multiply(x.contiguous(), state)


class DeterministicLinear:
    """Multiplies 16 rows at a time, so that a row's sum is taken in one order whatever stands beside it.

    A kernel chooses its order of summation by the shapes of its operands; packed weights do not cure
    that (at 3072 inputs a row alone differs from the same row in a batch). One shape does.
    """

    def __init__(self, spec: LinearSpec, *, packed: bool = False) -> None:
        self.spec = spec
        self._packed = packed

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        if self._packed:
            return PackedLinear(self.spec).pack(weight, bias)
        return LinearState(weight.contiguous(), bias)

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        num_rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -num_rows % TILE))
        out = x.new_empty(padded.shape[0], self.spec.out_features)
        for start in range(0, padded.shape[0], TILE):
            # A fresh tile each time: kernels may also choose by the alignment of their operands.
            out[start : start + TILE] = multiply(padded[start : start + TILE].clone(), state)
        return out[:num_rows]


def multiply(x: Tensor, state: LinearState) -> Tensor:
    """x [M, K] · weightᵀ + bias for a plain or a packed weight; x is contiguous and M is not 0."""
    if not state.weight.is_mkldnn:
        return torch_linear(x, state.weight, state.bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, state.weight, state.bias, "none", [], "")
    return result


def packs_well(spec: LinearSpec, device: torch.device) -> bool:
    """Whether packing is possible here and pays: float32, and bfloat16 where the processor computes it natively."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if spec.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # Measured on x86 only; elsewhere torch's own choice stands.
    return spec.dtype is torch.float32 and platform.machine().lower() in {"x86_64", "amd64"}
