"""A linear layer of a checkpoint in integer codes: formats add what is stored and how it is decoded."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from quire.plugin import (
    GraphSupport,
    LinearSpec,
    QuantInit,
    QuantLinear,
    QuantLinearOp,
    QuantLinearSpec,
    QuantMethod,
    QuantTensor,
    UnsupportedModel,
)
from torch import Tensor

from quire_quant.codes import Codes, Form

logger = logging.getLogger(__name__)

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
SHAPES = ((256, 96), (384, 32), (128, 1504))
"""(inputs, outputs) of the conformance kit's layers: whole words and groups of 128."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a fused layer's outputs, packed; `perm` is the order of inputs that its columns are in."""

    op: QuantLinearOp
    out_features: int
    perm: Tensor | None
    state: Any


class CodesLinear(QuantLinear):
    """Holds the decoded layer in the form of the operation that was chosen for it.

    Args:
        spec: the layer, maybe fused. sources: the checkpoint's layers in it.
        form: bits and group of its codes. method: what it belongs to.
    """

    graph = GraphSupport.ANY

    def __init__(self, spec: LinearSpec, sources: tuple[LinearSpec, ...], form: Form, method: CheckpointMethod) -> None:
        super().__init__(spec)
        self.sources, self.form = sources, form
        self._extra_bias = not spec.bias and any(f"{s.name}.bias" in method.init.stored for s in sources)
        self._op = method.init.op
        method.check_shapes(sources, self.stored_tensors)

    @abstractmethod
    def stored_tensors(self, out_features: int) -> tuple[QuantTensor, ...]:
        """What the checkpoint stores for a layer of that many outputs, the bias apart."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
        """The canonical form: of the whole, or of each source if their inputs are ordered differently."""

    def has_zeros(self) -> bool:
        """Whether zero points are anything but the middle, as far as settings and headers tell."""
        return True

    def operation(self) -> QuantLinearSpec:
        return self.form.spec(self.spec, has_zeros=self.has_zeros())

    def tensors(self) -> tuple[QuantTensor, ...]:
        wanted = self.stored_tensors(self.spec.out_features)
        # Some tools write biases of zeros for layers that have none.
        extra = (QuantTensor("bias", (self.spec.out_features,), torch.float16, 0),) if self._extra_bias else ()
        return wanted + extra

    def finalize(self, tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Part, ...]:
        if self._extra_bias and bool(tensors["bias"].any()):
            raise UnsupportedModel(
                f"{self.spec.name} has a bias that the architecture does not know",
                remedy="the checkpoint's config.json and weights do not belong together",
            )
        parts = []
        for codes in self.decode(tensors):
            moved = codes.to(device)
            op: QuantLinearOp = self._op(moved.spec(self.spec))
            state = op.pack(moved.codes, moved.scales.float(), moved.float_zeros)
            parts.append(Part(op, len(moved.codes), moved.perm, state))
        return tuple(parts)

    def forward(self, x: Tensor, state: tuple[Part, ...], bias: Tensor | None) -> Tensor:
        outs, start = [], 0
        for part in state:
            ordered = x if part.perm is None else x.index_select(1, part.perm)
            end = start + part.out_features
            outs.append(part.op(ordered, part.state, None if bias is None else bias[start:end]))
            start = end
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def dequantize(self, state: tuple[Part, ...]) -> Tensor:
        weights = []
        for part in state:
            weight = part.op.weight(part.state)
            if part.perm is not None:
                weight = torch.empty_like(weight).index_copy_(1, part.perm, weight)
            weights.append(weight)
        return torch.cat(weights)


class CheckpointMethod(QuantMethod):
    """A method that reads quantized checkpoints: which layers are quantized is decided by the tensors present."""

    marker: str
    """Suffix of the tensor that every quantized layer has."""

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        self._told: set[str] = set()
        refuse_stacked_experts(name for name in init.stored if name.endswith(f".{self.marker}"))

    def is_quantized(self, source: LinearSpec) -> bool:
        """Whether the checkpoint stores the layer in quantized form."""
        return f"{source.name}.{self.marker}" in self.init.stored

    def form_of(self, source: LinearSpec) -> str:
        """What has to be alike in quantized layers for them to be fused."""
        return "quantized"

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        """Only layers of one form; says which are not."""
        forms = {s.name: self.form_of(s) if self.is_quantized(s) else "unquantized" for s in sources}
        if len(set(forms.values())) == 1:
            return True
        each = "; ".join(f"{name.rpartition('.')[2]}: {form}" for name, form in forms.items())
        if each not in self._told:
            self._told.add(each)
            logger.warning("%s and where else it is so: not fused, as forms differ: %s", sources[0].name, each)
        return False

    def check_shapes(self, sources: tuple[LinearSpec, ...], stored_tensors: Any) -> None:
        """Compare what the configuration makes of each tensor with what the file says. Raises UnsupportedModel."""
        for source in sources:
            for tensor in stored_tensors(source.out_features):
                found = self.init.stored.get(f"{source.name}.{tensor.name}")
                if found is not None and tuple(found[0]) != tensor.shape:
                    raise UnsupportedModel(
                        f"{source.name}.{tensor.name} has shape {list(found[0])}; "
                        f"its quantization settings make it {list(tensor.shape)}",
                        remedy="bits, group_size or format in quantization_config are not those it was made with",
                    )


def refuse_stacked_experts(quantized: Iterable[str]) -> None:
    """Raises UnsupportedModel if one of these tensors holds several experts: each is read by itself."""
    stacked = [name for name in quantized if ".experts." in name and not ONE_EXPERT.search(name)]
    if stacked:
        raise UnsupportedModel(
            f"{stacked[0]} holds all experts of a layer in quantized form; experts are read one by one only",
            remedy="take a checkpoint with tensors for each expert, or one whose experts are not quantized",
        )


def by_group(codes: Codes, g_idx: Tensor | None, sources: tuple[LinearSpec, ...], name: str) -> tuple[Codes, ...]:
    """Columns sorted by the group of each input: in one piece, or in one for each source if their orders differ.

    Args:
        codes: the fused layer's. g_idx: the sources' groups of inputs, one below the other [S * K], or None.
    """
    if g_idx is None:
        return (codes,)
    orders = g_idx.long().view(len(sources), -1)
    if bool((orders == orders[0]).all()):
        return (_sorted(codes, orders[0], name),)
    parts, start = [], 0
    for source, order in zip(sources, orders, strict=True):
        parts.append(_sorted(codes.rows(start, start + source.out_features), order, name))
        start += source.out_features
    return tuple(parts)


def _sorted(codes: Codes, g_idx: Tensor, name: str) -> Codes:
    runs = torch.arange(len(g_idx)) // codes.form.group_size
    if torch.equal(g_idx, runs):
        return codes
    perm = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[perm], runs):
        raise UnsupportedModel(
            f"{name}: g_idx does not make groups of {codes.form.group_size} inputs",
            remedy="group_size in quantization_config is not the one it was made with",
        )
    return Codes(codes.form, codes.codes[:, perm], codes.scales, codes.zeros, perm)
