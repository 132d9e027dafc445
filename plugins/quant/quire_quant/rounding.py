"""int8 and int4 weights, one scale per output row and group of inputs, rounded to nearest when they are loaded.

A group's outermost weight gets code 0, so that all codes are used; weights as far on the other side are
off by one step, all others by half a step. Scales are rounded to float16, which kernels may store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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

UNQUANTIZED = ("lm_head", "gate")
"""Last parts of the paths of layers left alone: the output head, and routers, whose choices are brittle."""


class Int8Options(BaseModel):
    """Options of the `int8` method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(default=128, ge=16)
    """Inputs that share a scale; a layer whose inputs it does not divide stays unquantized."""


class Int4Options(BaseModel):
    """Options of the `int4` method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(default=32, ge=16)
    """Inputs that share a scale; a layer whose inputs it does not divide stays unquantized."""


class RoundingMethod(QuantMethod):
    """Quantizes the linear layers of an unquantized checkpoint."""

    bits: ClassVar[int]
    options: ClassVar[type[Int8Options] | type[Int4Options]]

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        self._form = Form(self.bits, (init.options or self.options()).group_size)

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if spec.in_features % self._form.group_size or spec.name.rpartition(".")[2] in UNQUANTIZED:
            return None
        return RoundedLinear(spec, self._form, self.init)


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
    groups = weight.float().view(weight.shape[0], -1, form.group_size)
    half = 1 << (form.bits - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (torch.where(high > -low, high, low) / -half).half().float()
    scales = torch.where(scales == 0, 1.0, scales)  # a group of zeros
    codes = (groups / scales[..., None]).round_().add_(half).clamp_(0, 2 * half - 1)
    return Codes(form, codes.to(torch.uint8).view_as(weight), scales)
