"""int8 weights with one scale per output row and group of inputs, rounded to nearest when they are loaded.

Half of bfloat16's memory, an error of at most half a step per weight. In plain torch, rows are
dequantized chunk by chunk for every multiplication, so it trades speed for memory; plugins with
kernels of their own may register faster methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import LinearSpec, QuantInit, QuantLinear, QuantMethod, QuantTensor
from torch import Tensor

from quire_quant.rows import multiply

LIMIT = 127
"""Largest code; symmetric, so that -128 is not used."""
UNQUANTIZED = ("lm_head", "gate")
"""Last parts of the paths of layers left alone: the output head, and routers, whose choices are brittle."""


class Int8Options(BaseModel):
    """Options of the `int8` method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(default=128, ge=16)
    """Inputs that share a scale; a layer whose inputs it does not divide stays unquantized."""


class Int8Method(QuantMethod):
    """Quantizes the linear layers of an unquantized checkpoint."""

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        self._group_size: int = (init.options or Int8Options()).group_size

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if spec.in_features % self._group_size or spec.name.rpartition(".")[2] in UNQUANTIZED:
            return None
        return Int8Linear(spec, self._group_size)


@dataclass(frozen=True, slots=True)
class Int8State:
    """Codes int8 [N, K] and scales float32 [N, K / group_size]."""

    codes: Tensor
    scales: Tensor


class Int8Linear(QuantLinear):
    """One linear layer in int8."""

    def __init__(self, spec: LinearSpec, group_size: int) -> None:
        super().__init__(spec)
        self._group_size = group_size

    def tensors(self) -> tuple[QuantTensor, ...]:
        return (QuantTensor("weight", (self.spec.out_features, self.spec.in_features), self.spec.dtype, out_dim=0),)

    def finalize(self, tensors: Mapping[str, Tensor], device: torch.device) -> Int8State:
        weight = tensors["weight"]
        groups = weight.to(device, torch.float32).view(weight.shape[0], -1, self._group_size)
        scales = groups.abs().amax(-1) / LIMIT
        safe = torch.where(scales == 0, 1.0, scales)  # a group of zeros
        codes = (groups / safe[..., None]).round().clamp(-LIMIT, LIMIT).to(torch.int8)
        return Int8State(codes.view_as(weight), safe)

    def forward(self, x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        def rows(start: int, end: int) -> Tensor:
            return self._rows(state, start, end)

        return multiply(x, self.spec.out_features, rows, bias, deterministic=self.spec.deterministic)

    def dequantize(self, state: Any) -> Tensor:
        return self._rows(state, 0, self.spec.out_features)

    def _rows(self, state: Int8State, start: int, end: int) -> Tensor:
        """Output rows `start` to `end` of the weight, in the compute dtype."""
        codes = state.codes[start:end].view(end - start, -1, self._group_size)
        return (codes * state.scales[start:end, :, None]).view(end - start, -1).to(self.spec.dtype)
