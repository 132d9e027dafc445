"""Kernels for weights in codes of at most 8 bits. Each packs the canonical form once, then multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from quire.plugin import ConfigError, LinearSpec
from torch import Tensor

from quire_quant.codes import Codes, Form, weight_of
from quire_quant.rows import multiply

AUTO = "auto"
INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes that torch's int4 operation accepts."""


class Kernel(ABC):
    """One way to hold and to multiply by codes."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, spec: LinearSpec, form: Form, device: torch.device) -> list[str]:
        """Reasons why it cannot serve such a layer; empty: it can."""

    @abstractmethod
    def pack(self, codes: Codes, spec: LinearSpec) -> Any:
        """The canonical form -> the state for `multiply`. Columns stay in the order of the codes."""

    @abstractmethod
    def multiply(self, x: Tensor, state: Any, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """x [T, K], its columns in the order of the codes -> [T, N]."""

    @abstractmethod
    def weight(self, state: Any, spec: LinearSpec) -> Tensor:
        """The weight [N, K] in spec's dtype, columns in the order of the codes."""


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


class Dequant(Kernel):
    """Makes the weight a few rows at a time for every multiplication. Serves everything, on any device."""

    name = "dequant"

    def why_not(self, spec: LinearSpec, form: Form, device: torch.device) -> list[str]:
        return []

    def pack(self, codes: Codes, spec: LinearSpec) -> Packed:
        data, bits = codes.codes, codes.form.bits
        per_byte = 4 if bits <= 2 else 2 if bits <= 4 else 1
        if data.shape[1] % per_byte:
            per_byte = 1
        if per_byte > 1:
            parts = data.view(len(data), -1, per_byte)
            packed = parts[..., 0].clone()
            for index in range(1, per_byte):
                packed |= parts[..., index] << (8 // per_byte * index)
            data = packed
        return Packed(data.contiguous(), per_byte, codes.scales.float(), codes.zero_points(), codes.form.group_size)

    def multiply(self, x: Tensor, state: Packed, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        def rows(start: int, end: int) -> Tensor:
            return state.rows(start, end).to(spec.dtype)

        return multiply(x, spec.out_features, rows, bias, deterministic=spec.deterministic)

    def weight(self, state: Packed, spec: LinearSpec) -> Tensor:
        return state.rows(0, spec.out_features).to(spec.dtype)


class Int4Pack(Kernel):
    """torch's int4 operation on the CPU. A row's bits do not depend on how many rows there are.

    W = (q - 8) * s + zero', zero' = (8 - z) * s, both in bfloat16. Its layout depends on the machine's
    instructions, so that it is never stored. It reads any code of up to 4 bits.
    """

    name = "int4pack"

    def why_not(self, spec: LinearSpec, form: Form, device: torch.device) -> list[str]:
        reasons = []
        if device.type != "cpu":
            reasons.append(f"it serves the CPU, not {device.type}")
        if form.bits > 4:
            reasons.append(f"codes have {form.bits} bits; it reads up to 4")
        if spec.dtype is not torch.bfloat16:
            reasons.append(
                f"the compute dtype is {str(spec.dtype).removeprefix('torch.')}; it is fast in bfloat16 only"
            )
        if spec.out_features % 16:
            reasons.append(f"{spec.out_features} outputs are no multiple of 16")
        if form.group_size % 32 or spec.in_features % form.group_size:
            reasons.append(
                f"groups of {form.group_size} in {spec.in_features} inputs; it needs a divisor that is a multiple of 32"
            )
        return reasons

    def pack(self, codes: Codes, spec: LinearSpec) -> tuple[Tensor, Tensor, int]:
        size = next(size for size in INT4_GROUPS if codes.form.group_size % size == 0)
        # Codes of fewer bits are moved to the middle, 8, so that the two terms do not cancel each other's digits.
        shift = 8 - (1 << (codes.form.bits - 1))
        scales, zeros = codes.scales.float(), codes.zero_points() + shift
        both = torch.stack([scales, (8.0 - zeros) * scales], -1).to(spec.dtype)  # [N, G, 2]
        both = both.repeat_interleave(codes.form.group_size // size, 1).transpose(0, 1).contiguous()
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.to(torch.int32).add_(shift), 1)
        return data, both, size

    def multiply(self, x: Tensor, state: tuple[Tensor, Tensor, int], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        data, both, size = state
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), data, size, both)
        return out if bias is None else out + bias

    def weight(self, state: tuple[Tensor, Tensor, int], spec: LinearSpec) -> Tensor:
        one = torch.eye(spec.in_features, dtype=spec.dtype)
        return self.multiply(one, state, None, spec).t().contiguous()


KERNELS: tuple[Kernel, ...] = (Int4Pack(), Dequant())
"""In order of preference."""


def choose(wanted: str, spec: LinearSpec, form: Form, device: torch.device) -> tuple[Kernel, str]:
    """The kernel for a layer and why it is that one: the first that serves it, or the one the user named.

    Raises:
        ConfigError: the one named does not exist, or does not serve the layer.
    """
    passed_over: list[str] = []
    for kernel in KERNELS:
        if wanted not in (AUTO, kernel.name):
            continue
        reasons = kernel.why_not(spec, form, device)
        if not reasons:
            return kernel, "; ".join(passed_over) or ("named by kernel" if wanted != AUTO else "first choice")
        passed_over.append(f"{kernel.name}: {', '.join(reasons)}")
    names = ", ".join([AUTO, *(kernel.name for kernel in KERNELS)])
    if passed_over:
        raise ConfigError(
            f"{spec.name}: kernel {wanted!r} cannot serve it: {'; '.join(passed_over)}",
            remedy=f"allowed are {names}; {AUTO} takes the first that can",
        )
    raise ConfigError(f"kernel is {wanted!r}", remedy=f"allowed are {names}")
