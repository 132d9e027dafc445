"""Multiplication by weights in codes of at most 8 bits, in plain torch: op sets of kind `quant_linear`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quire.plugin import OpSet, OpSpec, QuantLinearOp, QuantLinearSpec, UnsupportedModel
from torch import Tensor

from quire_quant.codes import weight_of
from quire_quant.rows import multiply

INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes that torch's int4 operation accepts."""


class DequantOps(OpSet):
    """Serves every such spec, on any device."""

    kinds = frozenset({"quant_linear"})

    def build(self, spec: OpSpec) -> QuantLinearOp:
        return Dequant(_quantized(spec))


class Int4PackOps(OpSet):
    """torch's own int4 operation for CPUs."""

    kinds = frozenset({"quant_linear"})

    def why_not(self, spec: OpSpec) -> list[str]:
        if not isinstance(spec, QuantLinearSpec):
            return super().why_not(spec)
        reasons = []
        if self.init.device.type != "cpu":
            reasons.append(f"it serves the CPU, not {self.init.device.type}")
        if spec.bits > 4:
            reasons.append(f"codes have {spec.bits} bits; it reads up to 4")
        if spec.dtype is not torch.bfloat16:
            reasons.append(
                f"the compute dtype is {str(spec.dtype).removeprefix('torch.')}; it is fast in bfloat16 only"
            )
        if spec.out_features % 16:
            reasons.append(f"{spec.out_features} outputs are no multiple of 16")
        if spec.group_size % 32 or spec.in_features % spec.group_size:
            reasons.append(
                f"groups of {spec.group_size} in {spec.in_features} inputs; it needs a divisor that is a multiple of 32"
            )
        return reasons

    def build(self, spec: OpSpec) -> QuantLinearOp:
        return Int4Pack(_quantized(spec))


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes in bytes, `per_byte` of them in each, low bits first; scales and zeros float32 [N, G]."""

    data: Tensor
    per_byte: int
    scales: Tensor
    zeros: Tensor
    group_size: int

    def rows(self, start: int, end: int) -> Tensor:
        """Rows of the weight, float32."""
        data, width = self.data[start:end], 8 // self.per_byte
        if self.per_byte > 1:
            mask = (1 << width) - 1
            data = torch.stack([(data >> (width * i)) & mask for i in range(self.per_byte)], -1).view(end - start, -1)
        return weight_of(data, self.scales[start:end], self.zeros[start:end], self.group_size)


class Dequant:
    """Makes the weight a few rows at a time for every multiplication."""

    def __init__(self, spec: QuantLinearSpec) -> None:
        self.spec = spec

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Packed:
        bits = self.spec.bits
        per_byte = 4 if bits <= 2 else 2 if bits <= 4 else 1
        if codes.shape[1] % per_byte:
            per_byte = 1
        data = codes
        if per_byte > 1:
            parts = codes.view(len(codes), -1, per_byte)
            data = parts[..., 0].clone()
            for index in range(1, per_byte):
                data |= parts[..., index] << (8 // per_byte * index)
        return Packed(data.contiguous(), per_byte, scales, _zeros(self.spec, scales, zeros), self.spec.group_size)

    def __call__(self, x: Tensor, state: Packed, bias: Tensor | None = None) -> Tensor:
        spec = self.spec

        def rows(start: int, end: int) -> Tensor:
            return state.rows(start, end).to(spec.dtype)

        return multiply(x, spec.out_features, rows, bias, deterministic=spec.deterministic)

    def weight(self, state: Packed) -> Tensor:
        return state.rows(0, self.spec.out_features).to(self.spec.dtype)


class Int4Pack:
    """torch's int4 operation on the CPU. A row's bits do not depend on how many rows there are.

    W = (q - 8) * s + zero', zero' = (8 - z) * s, both in bfloat16. Its layout depends on the machine's
    instructions, so that it is never stored. It reads any code of up to 4 bits.
    """

    def __init__(self, spec: QuantLinearSpec) -> None:
        self.spec = spec

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, int]:
        spec = self.spec
        size = next(size for size in INT4_GROUPS if spec.group_size % size == 0)
        # Codes of fewer bits are moved to the middle, 8, so that the two terms do not cancel each other's digits.
        shift = 8 - (1 << (spec.bits - 1))
        moved = _zeros(spec, scales, zeros) + shift
        both = torch.stack([scales, (8.0 - moved) * scales], -1).to(spec.dtype)  # [N, G, 2]
        both = both.repeat_interleave(spec.group_size // size, 1).transpose(0, 1).contiguous()
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).add_(shift), 1)
        return data, both, size

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor, int], bias: Tensor | None = None) -> Tensor:
        data, both, size = state
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), data, size, both)
        return out if bias is None else out + bias

    def weight(self, state: tuple[Tensor, Tensor, int]) -> Tensor:
        one = torch.eye(self.spec.in_features, dtype=self.spec.dtype)
        return self(one, state).t().contiguous()


def _quantized(spec: OpSpec) -> QuantLinearSpec:
    if not isinstance(spec, QuantLinearSpec):
        raise UnsupportedModel(f"operation {spec.kind!r} is not quant_linear")
    return spec


def _zeros(spec: QuantLinearSpec, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """float32 [N, G]"""
    return scales.new_tensor(float(1 << (spec.bits - 1))).expand_as(scales) if zeros is None else zeros
