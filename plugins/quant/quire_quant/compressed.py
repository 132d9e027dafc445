"""compressed-tensors checkpoints: weights packed in integers of 1 to 8 bits, or in float8.

Codes and zero points are stored with 2**(bits - 1) added, packed along the inputs and the outputs. Releases
before 0.20 put whole codes in each word where the bits do not divide 32; the width of the tensor tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from quire.plugin import LinearSpec, QuantInit, QuantLinear, QuantTensor, UnsupportedModel
from torch import Tensor

from quire_quant.bits import WORD, unpack
from quire_quant.codes import Codes, Form
from quire_quant.fp8 import BLOCK, FP8Linear, is_fp8, may_fuse_fp8
from quire_quant.linear import SHAPES, CheckpointMethod, CodesLinear, by_group

FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")

SAMPLE_CONFIG = MappingProxyType(
    {
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
            }
        },
    }
)
"""The configuration of the conformance kit's samples."""


class Weights(BaseModel):
    """How a group of layers is quantized."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8]
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None


def _sample(inputs: int, outputs: int, seed: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """A layer for the conformance kit; the tests' packer is imported when it is wanted."""
    from quire_quant.testing import compressed_sample

    return compressed_sample(inputs, outputs, seed)


class CompressedTensorsMethod(CheckpointMethod):
    """Reads checkpoints whose `quant_method` is compressed-tensors."""

    checkpoint_names = frozenset({"compressed-tensors"})
    marker = "weight_packed"
    conformance = MappingProxyType({"config": SAMPLE_CONFIG, "shapes": SHAPES, "sample": _sample})

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        config = init.config
        groups = list((config.get("config_groups") or {}).values())
        for form in {config.get("format"), *(group.get("format") for group in groups)} - {None}:
            if form not in FORMATS:
                raise UnsupportedModel(
                    f"compressed-tensors format {form!r} is not supported; read are {', '.join(FORMATS)}",
                    remedy="export the model as pack-quantized (weights of 4 or 8 bits) or float-quantized",
                )
        _check_kv_scheme(config.get("kv_cache_scheme") or {})
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise UnsupportedModel(
                "the checkpoint stores sparse weights (sparsity_config)", remedy="export it with format dense"
            )
        self._groups = [(tuple(group.get("targets") or ()), _weights(group)) for group in groups]

    def weights_of(self, name: str) -> Weights:
        """How the layer of that name is quantized. Raises UnsupportedModel if no group has it as a target."""
        for targets, weights in self._groups:
            if weights is not None and any(_matches(target, name) for target in targets):
                return weights
        raise UnsupportedModel(
            f"{name} is quantized, and no group of quantization_config.config_groups targets it",
            remedy="config.json and the weights do not belong together",
        )

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        """Layers of the same form, whose packed zero points end with whole words."""
        if not any(self.is_quantized(source) for source in sources):
            return may_fuse_fp8(self.init, sources, self._block(sources[0]))
        return super().may_fuse(sources)

    def form_of(self, source: LinearSpec) -> str:
        """Bits and group, and what is stored beside the codes; packed zero points have to end with a whole word."""
        weights = self.weights_of(source.name)
        beside = [suffix for suffix in OPTIONAL if f"{source.name}.{suffix}" in self.init.stored]
        part = source.out_features * weights.num_bits % WORD and "weight_zero_point" in beside
        return f"{weights} with {', '.join(beside) or 'codes and scales alone'}" + f", part of {source.name}" * bool(
            part
        )

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if is_fp8(self.init, sources[0]):
            return FP8Linear(spec, sources, self.init, self._block(sources[0]))
        if not self.is_quantized(sources[0]):
            return None
        return PackedLinear(spec, sources, self.weights_of(sources[0].name), self)

    def _block(self, source: LinearSpec) -> tuple[int, int]:
        return (self.weights_of(source.name).block_structure or BLOCK) if is_fp8(self.init, source) else BLOCK


class PackedLinear(CodesLinear):
    """weight_packed int32 [N, words], weight_scale [N, G], weight_zero_point int32 [words, G], weight_g_idx [K]."""

    def __init__(
        self, spec: LinearSpec, sources: tuple[LinearSpec, ...], weights: Weights, method: CompressedTensorsMethod
    ) -> None:
        size = weights.group_size
        form = Form(weights.num_bits, size if size and 0 < size < spec.in_features else spec.in_features)
        self._stored = {suffix: method.init.stored.get(f"{sources[0].name}.{suffix}") for suffix in OPTIONAL}
        packed = method.init.stored[f"{sources[0].name}.{method.marker}"]
        self._older = bool(packed) and packed[0][-1] == _words(spec.in_features, form.bits, older=True)
        super().__init__(spec, sources, form, method)

    def stored_tensors(self, out_features: int) -> tuple[QuantTensor, ...]:
        inputs, bits = self.spec.in_features, self.form.bits
        groups = -(-inputs // self.form.group_size)
        wanted = [
            QuantTensor("weight_packed", (out_features, _words(inputs, bits, older=self._older)), torch.int32, 0),
            QuantTensor("weight_scale", (out_features, groups), torch.float32, 0),
        ]
        optional = {
            "weight_zero_point": ((_words(out_features, bits, older=self._older), groups), torch.int32),
            "weight_g_idx": ((inputs,), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
        wanted += [QuantTensor(name, *what, 0) for name, what in optional.items() if self._stored[name] is not None]
        return tuple(wanted)

    def has_zeros(self) -> bool:
        return self._stored["weight_zero_point"] is not None

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
        bits = self.form.bits

        def codes_of(words: Tensor, count: int) -> Tensor:
            return (_unpack_older if self._older else unpack)(words, bits, count)

        codes = codes_of(tensors["weight_packed"].t().contiguous(), self.spec.in_features).t().contiguous()
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            zeros = codes_of(zeros, self.spec.out_features)
        whole = Codes(self.form, codes, tensors["weight_scale"], zeros)
        return by_group(whole, tensors.get("weight_g_idx"), self.sources, self.spec.name)


OPTIONAL = ("weight_zero_point", "weight_g_idx", "weight_shape")


def _check_kv_scheme(scheme: Mapping[str, Any]) -> None:
    """Its scales are tensors that the model reads, and uses if the cache is of 8-bit floats."""
    read = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    for name, value in read.items():
        if scheme.get(name, value) != value:
            raise UnsupportedModel(
                f"compressed-tensors kv_cache_scheme has {name} {scheme[name]!r}; read is {value!r}",
                remedy="export the model with a scheme of 8-bit floats by tensor, or without one",
            )


def _words(count: int, bits: int, *, older: bool) -> int:
    return -(-count // (WORD // bits)) if older else -(-count * bits // WORD)


def _unpack_older(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, C] of WORD // bits whole codes each -> uint8 [count, C]."""
    mask = (1 << bits) - 1
    codes = torch.stack([((words >> (bits * i)) & mask).to(torch.uint8) for i in range(WORD // bits)], 1)
    return codes.view(-1, words.shape[1])[:count].contiguous()


def _matches(target: str, name: str) -> bool:
    """Whether a target means a layer: the class of linear layers, a regular expression, or a name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in ("Linear", name)


def _weights(group: Mapping[str, Any]) -> Weights | None:
    if not group.get("weights"):
        return None
    try:
        return Weights.model_validate(group["weights"])
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UnsupportedModel(
            f"compressed-tensors weights.{name} is {group['weights'].get(name)!r}: {first['msg']}",
            remedy="read are integers of 1 to 8 bits, by group or by channel, and float8",
        ) from None
