"""Linears with their weights in codes of at most 8 bits.

In float32 the codes are widened in registers, and the result is that of the weight in floats. In bfloat16 the inputs
become whole numbers of 16 bits with a scale of their own for each row and group, and the sums are exact. Where the
method allows it (`QuantLinearSpec.input_bits`), or for those who name `native_a8`, they become whole numbers of 8 bits
in its place, which is faster and less exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from quire.plugin import QuantLinearSpec
from torch import Tensor

from quire_cpu_native.native import PANEL, CodesFields, Native, rows_of

A8, A16 = "codes_linear_a8", "codes_linear"
"""Kernels, by the bits of their inputs in bfloat16."""


WORD_INPUTS: Mapping[int, int] = MappingProxyType({4: 8, 6: 16, 8: 4})
"""Bits of a packed code -> inputs that are packed together, as in `codes.h`."""


@dataclass(frozen=True, slots=True)
class CodesState:
    """What the kernel reads at address `place`; `tensors` holds the memory that the fields point to."""

    place: int
    fields: CodesFields
    tensors: tuple[Tensor, ...]


class NativeQuantLinear:
    """Codes of up to 4 bits take 4, of 6 bits 6, others 8. Scales are held as float16 where that loses nothing."""

    def __init__(self, spec: QuantLinearSpec, kernels: Native, kernel: str = A16) -> None:
        self.spec = spec
        self._inputs, self._outputs = spec.in_features, spec.out_features
        self._memory = kernels.memory
        self._pack = kernels.function("codes_pack")
        self._weight = kernels.function("codes_weight")
        self._run = kernels.function(kernel, spec.dtype)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> CodesState:
        spec = self.spec
        bits = 4 if spec.bits <= 4 else 6 if spec.bits == 6 else 8
        word = WORD_INPUTS[bits]
        depth = spec.num_groups * -(-spec.group_size // word) * word
        panels = -(-spec.out_features // PANEL)
        packed = self._memory.empty(panels * PANEL * depth * bits // 8)
        halves = scales.half()
        exact = bool((halves.float() == scales).all())
        beside = (halves if exact else scales, *(() if zeros is None else (zeros,)))
        tensors = (packed, *(self._panels(each) for each in beside))
        fields = CodesFields(
            codes=packed.data_ptr(),
            scales=tensors[1].data_ptr(),
            zeros=None if zeros is None else tensors[2].data_ptr(),
            outputs=spec.out_features,
            inputs=spec.in_features,
            bits=bits,
            group=spec.group_size,
            half_scales=int(exact),
            middle=float(1 << (spec.bits - 1)),
        )
        codes = codes.contiguous()
        self._pack(ctypes.addressof(fields), codes.data_ptr(), packed.data_ptr())
        return CodesState(ctypes.addressof(fields), fields, tensors)

    def __call__(self, x: Tensor, state: CodesState, bias: Tensor | None = None) -> Tensor:
        x, apart = rows_of(x, self._inputs)
        rows = x.shape[0]
        out = x.new_empty(rows, self._outputs)
        self._run(state.place, None if bias is None else bias.data_ptr(), x.data_ptr(), apart, out.data_ptr(), rows)
        return out

    def weight(self, state: CodesState) -> Tensor:
        out = torch.empty(self.spec.out_features, self.spec.in_features)
        self._weight(state.place, out.data_ptr())
        return out.to(self.spec.dtype)

    def _panels(self, values: Tensor) -> Tensor:
        """[N, G] -> [panels, G, 64]"""
        padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % PANEL))
        panels = padded.view(-1, PANEL, values.shape[1]).transpose(1, 2)
        return self._memory.empty(panels.nbytes).view(values.dtype).view(panels.shape).copy_(panels)
