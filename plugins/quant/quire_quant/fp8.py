"""Weights in float8 (e4m3) with a scale per tensor, per output or per block.

Hugging Face's form calls the block scales `weight_scale_inv`; they are multiplied by all the same. On a GPU that
multiplies in FP8 they are kept as they are, and activations are rounded to FP8 with scales of their own. Elsewhere
they are dequantized when they are loaded, and multiplied by the operation for unquantized weights; activations stay in
the compute dtype, which is more exact.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from quire.plugin import (
    GraphSupport,
    LinearOp,
    LinearSpec,
    OpSpec,
    QuantInit,
    QuantLinear,
    QuantMethod,
    QuantTensor,
    UnsupportedModel,
)
from torch import Tensor

from quire_quant.codes import per_column
from quire_quant.linear import SHAPES, refuse_stacked_experts
from quire_quant.scaled_mm import facts_of, why_not

logger = logging.getLogger(__name__)

SCALES = ("weight_scale", "weight_scale_inv")
IGNORED = ("input_scale", "activation_scale")
"""Scales for activations that were measured beforehand; those of the activations themselves are used instead."""
BLOCK = (128, 128)
SCALAR = ((), (1,), (1, 1))
"""Shapes of one scale for the whole tensor."""


def _sample(inputs: int, outputs: int, seed: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """A layer for the conformance kit; the tests' packer is imported when it is wanted."""
    from quire_quant.testing import fp8_sample

    return fp8_sample(inputs, outputs, seed)


class FP8Method(QuantMethod):
    """Reads checkpoints whose `quant_method` is fp8."""

    checkpoint_names = frozenset({"fp8"})
    conformance = MappingProxyType({"config": {"weight_block_size": [32, 128]}, "shapes": SHAPES, "sample": _sample})

    def __init__(self, init: QuantInit) -> None:
        super().__init__(init)
        refuse_stacked_experts(name for name, (_, dtype) in init.stored.items() if dtype is torch.float8_e4m3fn)
        self.block = _block(init.config.get("weight_block_size"))

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        return may_fuse_fp8(self.init, sources, self.block)

    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        return FP8Linear(spec, sources, self.init, self.block) if is_fp8(self.init, sources[0]) else None


def is_fp8(init: QuantInit, source: LinearSpec) -> bool:
    """Whether the checkpoint stores the layer's weight in float8."""
    found = init.stored.get(f"{source.name}.weight")
    return found is not None and found[1] is torch.float8_e4m3fn


def may_fuse_fp8(init: QuantInit, sources: tuple[LinearSpec, ...], block: tuple[int, int]) -> bool:
    """Whether the scales may stand one below the other: for each tensor, each output, or whole blocks of outputs."""
    if not all(is_fp8(init, source) for source in sources):
        return not any(is_fp8(init, source) for source in sources)
    kinds = set()
    for source in sources:
        name, shape = _scale_of(init, source)
        ignored = tuple(other for other in IGNORED if f"{source.name}.{other}" in init.stored)
        if shape in SCALAR or shape in _per_output(source):
            kinds.add((name, ignored, shape if shape in SCALAR else len(shape)))
        elif source.out_features % block[0]:
            return False
        else:
            kinds.add((name, ignored, block))
    return len(kinds) == 1


@dataclass(frozen=True, slots=True)
class Dequantized:
    """A layer's weight in the compute dtype, packed by the operation for unquantized layers.

    Attributes:
        op: multiplies by `packed`. like: empty, of the weight's inputs, dtype and device.
    """

    op: LinearOp
    packed: Any
    like: Tensor

    @classmethod
    def of(cls, weight: Tensor, op: LinearOp) -> Self:
        """Packs weight [N, K]."""
        return cls(op, op.pack(weight, None), weight.new_empty(0, weight.shape[1]))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        out: Tensor = self.op(x, self.packed)
        return out if bias is None else out + bias

    def dense(self) -> Tensor:
        """The weight [N, K], from what each input alone is multiplied to."""
        one = torch.eye(self.like.shape[1], dtype=self.like.dtype, device=self.like.device)
        return self(one, None).t().contiguous()


class FP8Linear(QuantLinear):
    """weight float8 [N, K]; its scale [], [1], [N], [N, 1] or [ceil(N / block), ceil(K / block)].

    Attributes:
        why_dequantized: why the weight is not multiplied as it is; empty: it is.
    """

    graph = GraphSupport.ANY

    def __init__(
        self, spec: LinearSpec, sources: tuple[LinearSpec, ...], init: QuantInit, block: tuple[int, int]
    ) -> None:
        super().__init__(spec)
        self._block, self._sizes = block, [source.out_features for source in sources]
        self._scale, shape = _scale_of(init, sources[0])
        self._scale_shape = _fused_shape(spec, sources[0], shape, block)
        self._ignored = tuple(
            QuantTensor(name, tuple(init.stored[f"{sources[0].name}.{name}"][0]), torch.float32, 0)
            for name in IGNORED
            if f"{sources[0].name}.{name}" in init.stored
        )
        one_each = self._scale_shape in (*SCALAR, *_per_output(spec))
        self.why_dequantized = why_not(spec, None if one_each else block, facts_of(init.device))
        if self.why_dequantized:
            logger.debug("%s is dequantized: %s", spec.name, "; ".join(self.why_dequantized))
        # On the CPU a row must not see how many there are, whether or not that was asked for.
        self._plain = replace(spec, bias=False, deterministic=spec.deterministic or init.device.type == "cpu")
        self._op = init.op

    def tensors(self) -> tuple[QuantTensor, ...]:
        size = (self.spec.out_features, self.spec.in_features)
        scale = QuantTensor(self._scale, self._scale_shape, torch.float32, 0)
        return (QuantTensor("weight", size, torch.float8_e4m3fn, 0), scale, *self._ignored)

    def finalize(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        weight, scale = tensors["weight"].to(device), tensors[self._scale].to(device, torch.float32)
        if scale.numel() == len(self._sizes) and self._scale_shape in SCALAR:
            # One for each source: each of its rows takes it, so that nothing is rounded anew.
            scale = scale.flatten().repeat_interleave(torch.tensor(self._sizes, device=device))
        if scale.ndim == 1:
            scale = scale[:, None]
        if self.why_dequantized:
            return Dequantized.of(self._dense(weight, scale), self._op(self._plain))
        from quire_quant.float8_linear import Float8Weight

        return Float8Weight(weight.contiguous(), scale.contiguous())

    def _dense(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that float8 [N, K] means with scales [N, 1], or by block, in the compute dtype."""
        dense = torch.empty(weight.shape, dtype=self.spec.dtype, device=weight.device)
        step = self._block[0]
        rows_per_scale = 1 if len(scale) == len(weight) else step
        for start in range(0, len(weight), step):
            rows = torch.arange(start, min(start + step, len(weight)), device=weight.device)
            factor = scale[rows // rows_per_scale]
            if factor.shape[1] > 1:
                factor = per_column(factor, self._block[1], weight.shape[1])
            dense[start : start + step] = weight[start : start + step].float() * factor
        return dense

    def operation(self) -> OpSpec | None:
        return self._plain if self.why_dequantized else None

    def forward(self, x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        product: Tensor = state(x, bias)
        return product

    def dequantize(self, state: Any) -> Tensor:
        return state.dense() if isinstance(state, Dequantized) else self._dense(state.weight, state.scale)


def _scale_of(init: QuantInit, source: LinearSpec) -> tuple[str, tuple[int, ...]]:
    for name in SCALES:
        found = init.stored.get(f"{source.name}.{name}")
        if found is not None:
            return name, tuple(found[0])
    raise UnsupportedModel(
        f"{source.name}.weight is float8 and the checkpoint has no {' or '.join(SCALES)} for it",
        remedy="fetch the checkpoint again",
    )


def _per_output(source: LinearSpec) -> tuple[tuple[int, ...], ...]:
    return ((source.out_features,), (source.out_features, 1))


def _fused_shape(
    spec: LinearSpec, source: LinearSpec, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, ...]:
    """The scale's shape for the whole layer, from that of one source. Raises UnsupportedModel."""
    if shape in SCALAR:
        return shape
    if shape in _per_output(source):
        return (spec.out_features, *shape[1:])

    def blocks(outputs: int) -> tuple[int, int]:
        return -(-outputs // block[0]), -(-spec.in_features // block[1])

    if shape != blocks(source.out_features):
        raise UnsupportedModel(
            f"the scale of {source.name} has shape {list(shape)}; read are one for the tensor, one for each of "
            f"{source.out_features} outputs, or {list(blocks(source.out_features))} for blocks of {list(block)}",
            remedy="the block size in quantization_config is not the one it was made with",
        )
    return blocks(spec.out_features)


def _block(size: Any) -> tuple[int, int]:
    if size is None:
        return BLOCK
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)):
        raise UnsupportedModel(f"weight_block_size is {size!r}", remedy="it must be two numbers, such as [128, 128]")
    return int(size[0]), int(size[1])
