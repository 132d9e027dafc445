"""int8 and int4 weights, one scale per output row and group of inputs, rounded to nearest when they are loaded.

A group's outermost weight gets code 0, so that all codes are used; weights as far on the other side are
off by one step, all others by half a step. Scales are rounded to float16, which kernels may store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import (
    GraphSupport,
    LinearSpec,
    QuantInit,
    QuantLinear,
    QuantLinearOp,
    QuantLinearSpec,
    QuantMethod,
    QuantTensor,
)
from torch import Tensor

from quire_quant.codes import Codes, Form
from quire_quant.kernels import Dequant

UNQUANTIZED = ("gate",)
"""Last parts of the paths of layers left alone: routers, whose choices are brittle."""
HEAD = "lm_head"
"""Last part of the output head's path. It never gets 4 bits, which would cost it more than they cost a layer."""
PIECE = 1 << 20
"""Weights that are rounded at once: a few MB in floats, which the cache holds."""


class Int8Options(BaseModel):
    """Options of the `int8` method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(default=128, ge=16)
    """Inputs that share a scale; a layer whose inputs it does not divide stays unquantized."""
    head_bits: Literal[6, 8, 16] = 8
    """Of the output head; 16 leaves it unquantized, and so does the lack of a kernel faster than `dequant`."""
    input_bits: Literal[8, 16] = 16
    """8 lets kernels round a layer's inputs to 8 bits too, where that is faster."""


class Int4Options(Int8Options):
    """Options of the `int4` method."""

    group_size: int = Field(default=32, ge=16)
    """Inputs that share a scale; a layer whose inputs it does not divide stays unquantized."""
    head_bits: Literal[6, 8, 16] = 6
    """As in `Int8Options`: beside layers of 4 bits two more are hardly seen. A GPU's kernels hold 6 bits in bytes."""
    input_bits: Literal[8, 16] = 8
    """8 lets kernels round a layer's inputs to 8 bits too, where that is faster: weights of 4 bits cost far more."""


class RoundingMethod(QuantMethod):
    """Quantizes the linear layers of an unquantized checkpoint."""

    bits: ClassVar[int]
    options: ClassVar[type[Int8Options]]

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        self._options = init.options or self.options()

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        last, group = spec.name.rpartition(".")[2], self._options.group_size
        bits = self._options.head_bits if last == HEAD else self.bits
        if spec.in_features % group or last in UNQUANTIZED or bits > 8:
            return None
        layer = RoundedLinear(spec, Form(bits, group, self._options.input_bits), self.init)
        if last == HEAD and isinstance(self.init.op(layer.operation()), Dequant):
            return None  # which would take longer for the head than all layers take
        return layer


class Int8Method(RoundingMethod):
    """Half of bfloat16's memory."""

    bits, options = 8, Int8Options


class Int4Method(RoundingMethod):
    """4.5 bits per weight in groups of 32."""

    bits, options = 4, Int4Options


@dataclass(frozen=True, slots=True)
class RoundedState:
    """The operation, and what it packed."""

    op: QuantLinearOp
    packed: Any


class RoundedLinear(QuantLinear):
    """One linear layer, rounded."""

    graph = GraphSupport.ANY

    def __init__(self, spec: LinearSpec, form: Form, init: QuantInit) -> None:
        super().__init__(spec)
        self._form, self._op = form, init.op

    def operation(self) -> QuantLinearSpec:
        return self._form.spec(self.spec, has_zeros=False)

    def tensors(self) -> tuple[QuantTensor, ...]:
        return (QuantTensor("weight", (self.spec.out_features, self.spec.in_features), self.spec.dtype, out_dim=0),)

    def finalize(self, tensors: Mapping[str, Tensor], device: torch.device) -> RoundedState:
        codes = rounded(tensors["weight"].to(device), self._form)
        op: QuantLinearOp = self._op(codes.spec(self.spec))
        return RoundedState(op, op.pack(codes.codes, codes.scales, None))

    def forward(self, x: Tensor, state: RoundedState, bias: Tensor | None) -> Tensor:
        return state.op(x, state.packed, bias)

    def dequantize(self, state: RoundedState) -> Tensor:
        return state.op.weight(state.packed)


def rounded(weight: Tensor, form: Form) -> Codes:
    """Codes for weight [N, K]; form.group_size divides K."""
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, inputs // form.group_size, device=weight.device)
    step = max(1, PIECE // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        _round(weight[rows].to(torch.float32, copy=True), form, codes[rows], scales[rows])
    return Codes(form, codes, scales)


def _round(weight: Tensor, form: Form, codes: Tensor, scales: Tensor) -> None:
    """Fill codes [N, K] and scales [N, G] for weight [N, K], which is overwritten."""
    groups, half = weight.view(weight.shape[0], -1, form.group_size), 1 << (form.bits - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    steps = (torch.where(high > -low, high, low) / -half).half().float()
    scales.copy_(torch.where(steps == 0, 1.0, steps))  # a group of zeros
    groups.div_(scales[..., None]).round_().add_(half).clamp_(0, 2 * half - 1)
    codes.copy_(weight)
