"""Operations in C++. A row's bits never depend on how many rows there are, nor on the number of threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quire.plugin import (
    GatedActOp,
    GatedActSpec,
    GraphSupport,
    LinearOp,
    LinearSpec,
    OpInit,
    OpSet,
    OpSpec,
    QuantLinearOp,
    QuantLinearSpec,
    RMSNormOp,
    RMSNormSpec,
    UnsupportedModel,
)
from torch import Tensor

from quire_cpu_native.build import best_isa
from quire_cpu_native.codes import A8, A16, NativeQuantLinear
from quire_cpu_native.native import PANEL, SUFFIXES, Native, native, rows_of

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""In the order of rows.cpp."""
FAST_BYTES = frozenset({"avx512bf16"})
"""Instruction sets on which inputs of 8 bits pay: from two rows on, for a few percent that a single one loses."""


class NativeOps(OpSet):
    """Linears, plain and in codes, norms and gated activations, in float32 and bfloat16.

    Codes whose specification lets inputs have 8 bits get such a kernel where it is the faster one.
    """

    kinds = frozenset({"rms_norm", "gated_act", "linear", "quant_linear"})

    def __init__(self, init: OpInit) -> None:
        super().__init__(init)
        self._has_fast_bytes = best_isa() in FAST_BYTES
        self._native = native(torch.get_num_threads())

    def why_not(self, spec: OpSpec) -> list[str]:
        reasons = super().why_not(spec)
        dtype = getattr(spec, "dtype", None)
        if dtype not in SUFFIXES:
            reasons.append(f"there are kernels for float32 and bfloat16, not for {str(dtype).removeprefix('torch.')}")
        return reasons

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        return GraphSupport.ANY

    def build(self, spec: OpSpec) -> RMSNormOp | GatedActOp | LinearOp | QuantLinearOp:
        if isinstance(spec, RMSNormSpec):
            return NativeRMSNorm(spec, self._native)
        if isinstance(spec, GatedActSpec):
            return NativeGatedAct(spec, self._native)
        if isinstance(spec, LinearSpec):
            return NativeLinear(spec, self._native)
        if isinstance(spec, QuantLinearSpec):
            eight = spec.input_bits == 8 and spec.dtype is torch.bfloat16 and self._has_fast_bytes
            return NativeQuantLinear(spec, self._native, A8 if eight else A16)
        raise UnsupportedModel(f"operation {spec.kind!r} is not one of {sorted(self.kinds)}")


class NativeA8Ops(OpSet):
    """Codes by inputs of 8 bits (W4A8, W8A8), for those who name it: 0.6 percent off."""

    kinds = frozenset({"quant_linear"})

    def __init__(self, init: OpInit) -> None:
        super().__init__(init)
        self._native = native(torch.get_num_threads())

    def why_not(self, spec: OpSpec) -> list[str]:
        reasons = super().why_not(spec)
        if isinstance(spec, QuantLinearSpec) and spec.dtype is not torch.bfloat16:
            reasons.append(f"it is for bfloat16, not for {str(spec.dtype).removeprefix('torch.')}")
        return reasons

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        return GraphSupport.ANY

    def build(self, spec: OpSpec) -> QuantLinearOp:
        assert isinstance(spec, QuantLinearSpec)
        return NativeQuantLinear(spec, self._native, A8)


class NativeRMSNorm:
    """RMS norm (Zhang and Sennrich 2019) in float32. The residual is updated in place."""

    def __init__(self, spec: RMSNormSpec, kernels: Native) -> None:
        self.spec = spec
        self._size, self._eps, self._offset = spec.size, spec.eps, spec.weight_offset
        self._run = kernels.function("rms_norm", spec.dtype)

    def __call__(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x, size, beside = x.contiguous(), self._size, None
        if residual is not None:
            residual = residual.contiguous()
            beside = residual.data_ptr()
        out = torch.empty_like(x)
        rows = x.numel() // size
        self._run(x.data_ptr(), beside, weight.data_ptr(), out.data_ptr(), rows, size, self._eps, self._offset)
        return out, residual


class NativeGatedAct:
    """Gate and value stand side by side in one tensor."""

    def __init__(self, spec: GatedActSpec, kernels: Native) -> None:
        self.spec = spec
        self._size, self._kind = spec.size, ACTIVATIONS.index(spec.activation)
        self._run = kernels.function("gated_act", spec.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        size = self._size
        x, apart = rows_of(x, 2 * size)
        rows = x.shape[0]
        out = x.new_empty(rows, size)
        self._run(x.data_ptr(), apart, out.data_ptr(), rows, size, self._kind)
        return out


@dataclass(frozen=True, slots=True)
class LinearState:
    """The weight in panels, padded to whole ones, and the bias."""

    packed: Tensor
    bias: Tensor | None


class NativeLinear:
    """Each output is one chain of additions over the inputs in their order."""

    def __init__(self, spec: LinearSpec, kernels: Native) -> None:
        self.spec = spec
        self._inputs, self._outputs = spec.in_features, spec.out_features
        self._memory = kernels.memory
        self._pack = kernels.function("linear_pack", spec.dtype)
        self._run = kernels.function("linear", spec.dtype)

    def pack(self, weight: Tensor, bias: Tensor | None) -> LinearState:
        outputs, inputs = weight.shape
        depth = inputs + inputs % 2 if self.spec.dtype is torch.bfloat16 else inputs
        count = -(-outputs // PANEL) * depth * PANEL
        packed = self._memory.empty(count * weight.itemsize).view(weight.dtype)
        weight = weight.contiguous()
        self._pack(weight.data_ptr(), packed.data_ptr(), outputs, inputs)
        return LinearState(packed, None if bias is None else bias.contiguous())

    def __call__(self, x: Tensor, state: LinearState) -> Tensor:
        inputs, outputs, bias = self._inputs, self._outputs, state.bias
        x, apart = rows_of(x, inputs)
        rows = x.shape[0]
        out = x.new_empty(rows, outputs)
        self._run(
            state.packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            apart,
            out.data_ptr(),
            rows,
            outputs,
            inputs,
        )
        return out
