"""AWQ checkpoints, 4 bits, in the layouts that AutoAWQ calls gemm and gemv.

gemm packs along the outputs, eight columns to a word in the order 0 2 4 6 1 3 5 7; gemv along the inputs, in
natural order. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from quire.plugin import LinearSpec, QuantInit, QuantLinear, QuantTensor, UnsupportedModel
from torch import Tensor

from quire_quant.bits import unpack
from quire_quant.codes import Codes, Form
from quire_quant.linear import SHAPES, CheckpointMethod, CodesLinear

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word's nibbles, lowest first."""
PLACE = tuple(ORDER.index(column) for column in range(PER_WORD))
"""Nibble of a word's columns."""
LAYOUTS = ("gemm", "gemv")


def _sample(inputs: int, outputs: int, seed: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """A layer for the conformance kit; the tests' packer is imported when it is wanted."""
    from quire_quant.testing import awq_sample

    return awq_sample(inputs, outputs, seed)


class AWQMethod(CheckpointMethod):
    """Reads checkpoints whose `quant_method` is awq."""

    checkpoint_names = frozenset({"awq"})
    marker = "qweight"
    conformance = MappingProxyType({"config": {"bits": 4, "group_size": 128}, "shapes": SHAPES, "sample": _sample})

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        config = init.config
        bits = config.get("bits", config.get("w_bit"))
        if bits != BITS:
            raise UnsupportedModel(
                f"AWQ bits is {bits!r}; the format has {BITS} only", remedy="use GPTQ for other bits"
            )
        self.layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if self.layout not in LAYOUTS:
            raise UnsupportedModel(
                f"AWQ version {self.layout!r} is not supported; read are {', '.join(LAYOUTS)}",
                remedy="export the model with version gemm",
            )
        self.group_size = _group_size(config)
        self.has_zeros = bool(config.get("zero_point", True))

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if not self.is_quantized(sources[0]):
            return None
        return (GemmLinear if self.layout == "gemm" else GemvLinear)(spec, sources, self)


class GemmLinear(CodesLinear):
    """qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]."""

    def __init__(self, spec: LinearSpec, sources: tuple[LinearSpec, ...], method: AWQMethod) -> None:
        size = method.group_size if method.group_size > 0 else spec.in_features
        for source in sources:
            if source.out_features % PER_WORD or spec.in_features % size or spec.in_features % PER_WORD:
                raise UnsupportedModel(
                    f"AWQ {source.name}: {spec.in_features} inputs in groups of {size} and {source.out_features} "
                    f"outputs do not fill whole groups and words of {PER_WORD}",
                    remedy="group_size in quantization_config is not the one it was made with",
                )
        self._has_zeros = method.has_zeros or f"{sources[0].name}.qzeros" in method.init.stored
        super().__init__(spec, sources, Form(BITS, size), method)

    def stored_tensors(self, out_features: int) -> tuple[QuantTensor, ...]:
        inputs, words = self.spec.in_features, out_features // PER_WORD
        groups = inputs // self.form.group_size
        return (
            QuantTensor("qweight", (inputs, words), torch.int32, 1),
            QuantTensor("qzeros", (groups, words), torch.int32, 1, required=self._has_zeros),
            QuantTensor("scales", (groups, out_features), torch.float16, 1),
        )

    def has_zeros(self) -> bool:
        return self._has_zeros

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
        zeros = columns(tensors["qzeros"]).t().contiguous() if self._has_zeros else None
        codes = columns(tensors["qweight"]).t().contiguous()
        return (Codes(self.form, codes, tensors["scales"].t().contiguous(), zeros),)


class GemvLinear(GemmLinear):
    """qweight int32 [N, K/8], qzeros int32 [N, w], scales [N, 8w]: w words hold the groups, padded with zeros."""

    def stored_tensors(self, out_features: int) -> tuple[QuantTensor, ...]:
        inputs, width = self.spec.in_features, self._width()
        return (
            QuantTensor("qweight", (out_features, inputs // PER_WORD), torch.int32, 0),
            QuantTensor("qzeros", (out_features, width), torch.int32, 0, required=self._has_zeros),
            QuantTensor("scales", (out_features, width * PER_WORD), torch.float16, 0),
        )

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
        inputs, groups = self.spec.in_features, self.spec.in_features // self.form.group_size

        def natural(words: Tensor, count: int) -> Tensor:
            return unpack(words.t().contiguous(), BITS, count).t().contiguous()

        zeros = natural(tensors["qzeros"], groups) if self._has_zeros else None
        scales = tensors["scales"][:, :groups].contiguous()
        return (Codes(self.form, natural(tensors["qweight"], inputs), scales, zeros),)

    def _width(self) -> int:
        size = self.form.group_size
        multiple = 1 if size >= 128 else 2 if size == 64 else 4
        words = -(-(self.spec.in_features // size) // PER_WORD)
        return -(-words // multiple) * multiple


def columns(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8C], AWQ's order of columns undone."""
    nibbles = torch.stack([((words >> (BITS * place)) & 15).to(torch.uint8) for place in PLACE], -1)
    return nibbles.view(len(words), -1)


def _group_size(config: Mapping[str, Any]) -> int:
    size = config.get("group_size", config.get("q_group_size", 128))
    if not isinstance(size, int) or (size != -1 and size < PER_WORD):
        raise UnsupportedModel(f"AWQ group_size is {size!r}", remedy=f"it must be a number from {PER_WORD}, or -1")
    return size
