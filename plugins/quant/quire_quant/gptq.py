"""GPTQ checkpoints: 2, 3, 4 and 8 bits, both forms of zero points, any group size, activation order.

Written after what AutoGPTQ and GPTQModel write. Codes are packed along the inputs, zero points along the
outputs. The first form of the format stores each zero point less one, within its own field.
"""

from __future__ import annotations

import logging
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
from quire_quant.linear import SHAPES, CheckpointMethod, CodesLinear, by_group

logger = logging.getLogger(__name__)

V1, V2 = "gptq", "gptq_v2"
AUTO_ROUND = "auto-round"
OTHER_FORMATS = {
    "marlin": "is a kernel's layout, not a portable format",
    "bitblas": "is a kernel's layout, not a portable format",
    "gptq_p": "stores the bits of its codes in planes",
    "qqq": "is made for activations of 8 bits",
    "exl3": "codes weights by a trellis",
}
"""What tools of this family also write, and why it is not read."""


class LayerSettings(BaseModel):
    """What may differ from layer to layer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: Literal[2, 3, 4, 8]
    group_size: int = 128
    sym: bool = True


def _sample(inputs: int, outputs: int, seed: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """A layer for the conformance kit; the tests' packer is imported when it is wanted."""
    from quire_quant.testing import gptq_sample

    return gptq_sample(inputs, outputs, seed)


class GPTQMethod(CheckpointMethod):
    """Reads checkpoints whose `quant_method` is gptq, and AutoRound's in that format."""

    checkpoint_names = frozenset({"gptq", AUTO_ROUND})
    marker = "qweight"
    conformance = MappingProxyType(
        {"config": {"bits": 4, "group_size": 128, "sym": False}, "shapes": SHAPES, "sample": _sample}
    )

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        config = init.config
        form = _format(config)
        if form not in (V1, V2):
            raise UnsupportedModel(
                f"GPTQ format {form!r} {OTHER_FORMATS.get(form, 'is not known')}; read are {V1} and {V2}",
                remedy="export the model as gptq or compressed-tensors",
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise UnsupportedModel(
                f"GPTQ pack_dtype is {config['pack_dtype']!r}; read is int32", remedy="export it with int32"
            )
        self.is_v1 = form == V1
        self._base = _settings(config)
        # AutoRound's rules are names or regular expressions too.
        self._rules: Mapping[str, Mapping[str, Any]] = config.get("dynamic") or config.get("extra_config") or {}
        if not self._base.sym and self.is_v1 and "gptqmodel" not in str(config.get("meta")):
            logger.warning(
                "asymmetric GPTQ in its first form: where a zero point is 0, old tools spoiled the fields beside it; "
                "if the model answers badly, take a checkpoint in the form gptq_v2"
            )

    def settings(self, name: str) -> LayerSettings:
        """The settings of the layer of that name, after `dynamic` rules; the first that matches counts."""
        for rule, changes in self._rules.items():
            if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
                return _settings({**self._base.model_dump(), **changes})
        return self._base

    def form_of(self, source: LinearSpec) -> str:
        """Bits, group and symmetry."""
        return str(self.settings(source.name))

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if not self.is_quantized(sources[0]):
            return None
        return GPTQLinear(spec, sources, self.settings(sources[0].name), self)


class GPTQLinear(CodesLinear):
    """qweight int32 [K·b/32, N], qzeros int32 [G, N·b/32], scales [G, N], g_idx int32 [K] (may be absent)."""

    def __init__(
        self, spec: LinearSpec, sources: tuple[LinearSpec, ...], settings: LayerSettings, method: GPTQMethod
    ) -> None:
        size = settings.group_size
        form = Form(settings.bits, size if 0 < size < spec.in_features else spec.in_features)
        for what, count in (("inputs", spec.in_features), *(("outputs", s.out_features) for s in sources)):
            if count * form.bits % WORD:
                raise UnsupportedModel(
                    f"GPTQ {spec.name}: {count} {what} of {form.bits} bits do not fill whole words of {WORD} bits",
                    remedy="leave this layer unquantized when the checkpoint is made",
                )
        self._settings, self._is_v1 = settings, method.is_v1
        super().__init__(spec, sources, form, method)

    def stored_tensors(self, out_features: int) -> tuple[QuantTensor, ...]:
        inputs, bits = self.spec.in_features, self.form.bits
        groups = -(-inputs // self.form.group_size)
        return (
            QuantTensor("qweight", (inputs * bits // WORD, out_features), torch.int32, 1),
            QuantTensor("qzeros", (groups, out_features * bits // WORD), torch.int32, 1),
            QuantTensor("scales", (groups, out_features), torch.float16, 1),
            # One below the other: sources that order their inputs differently are held apart.
            QuantTensor("g_idx", (inputs,), torch.int32, 0, required=False),
        )

    def has_zeros(self) -> bool:
        return not self._settings.sym

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
        codes = unpack(tensors["qweight"], self.form.bits, self.spec.in_features).t().contiguous()
        whole = Codes(self.form, codes, tensors["scales"].t().contiguous(), self._zeros(tensors["qzeros"]))
        return by_group(whole, tensors.get("g_idx"), self.sources, f"GPTQ {self.spec.name}")

    def _zeros(self, words: Tensor) -> Tensor | None:
        """uint8 [N, G]; None where all are in the middle. A header that says `sym` is believed if it can be."""
        bits, middle = self.form.bits, 1 << (self.form.bits - 1)
        stored = unpack(words.t().contiguous(), bits, self.spec.out_features)
        if self._settings.sym:
            # Some files say v1 and store v2's zero points; symmetric, both mean the middle.
            if bool(((stored == middle) | (stored == middle - 1)).all()) and bool((stored == stored[0, 0]).all()):
                return None
            logger.warning("%s: zero points are not all equal although sym is true; they are used", self.spec.name)
        mask = (1 << bits) - 1
        return (stored.int() + int(self._is_v1)).bitwise_and(mask).to(torch.uint8)


def _format(config: Mapping[str, Any]) -> str:
    if config.get("quant_method") == AUTO_ROUND:
        packing = str(config.get("packing_format"))
        return V1 if packing.removeprefix("auto_round:") == "auto_gptq" else packing
    if config.get("is_marlin_format"):  # as tools wrote it before there was a name for it
        return "marlin"
    return str(config.get("format") or config.get("checkpoint_format") or V1)


def _settings(config: Mapping[str, Any]) -> LayerSettings:
    try:
        return LayerSettings.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise UnsupportedModel(
            f"GPTQ {first['loc'][0]} is {config.get(str(first['loc'][0]))!r}: {first['msg']}",
            remedy="bits may be 2, 3, 4 or 8; group_size a number of inputs or -1",
        ) from None
