"""Quantized linear layers: what the checkpoint stores, how it is packed once, how it is multiplied.

A method is one file with three verbs: `tensors` says what to read, `finalize` repacks once at load,
`forward` multiplies. `dequantize` is required: it is the truth that tests compare with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.contract.attention import GraphSupport
from quire.contract.ops import LinearSpec, OpSpec
from quire.errors import ConfigError


def no_ops(spec: OpSpec) -> Any:
    """Where no op sets are at hand."""
    raise ConfigError(f"no op set serves {spec.kind}: none was given", remedy="construct the method with `op`")


@dataclass(frozen=True, slots=True)
class QuantInit:
    """All that a method is constructed from.

    Attributes:
        config: the checkpoint's `quantization_config`, empty for an unquantized checkpoint.
        stored: names of all tensors in the checkpoint with their shapes and dtypes.
        device: where the model will run.
        dtype: compute dtype.
        options: the validated instance of `Provider.options`, or None.
        op: the operation chosen for a spec, as `LayerFactory.op`; `quant_linear` multiplies by integer codes,
            `linear` by a weight that was dequantized.
    """

    config: Mapping[str, Any]
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    device: torch.device
    dtype: torch.dtype
    options: Any = None
    op: Callable[[OpSpec], Any] = no_ops


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """One tensor that a quantized layer reads from the checkpoint.

    Attributes:
        name: suffix after the layer's path, such as `qweight`.
        shape: as stored, for one unfused layer.
        dtype: as stored.
        out_dim: dimension that runs along the output features, so that q, k and v can be
            concatenated along it (a scalar with 0: one for each of them, [S]); None: the tensor must be equal in all.
        required: False if the checkpoint may lack it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None
    required: bool = True


class QuantLinear(ABC):
    """The quantized form of one linear layer, or of several fused along their outputs."""

    graph: ClassVar[GraphSupport] = GraphSupport.NEVER
    """Which batches `forward` can serve inside a captured graph, as in `OpSet.graph_support`."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    @abstractmethod
    def tensors(self) -> tuple[QuantTensor, ...]:
        """What to read from the checkpoint for a layer of `spec`'s size."""

    def operation(self) -> OpSpec | None:
        """What it will ask `QuantInit.op` for, as far as headers tell; None: it multiplies by itself.

        For `quire plugins explain quantization`, which reads no tensors.
        """
        return None

    @abstractmethod
    def finalize(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        """Validate and repack, once; returns the state for `forward`. Raises UnsupportedModel."""

    @abstractmethod
    def forward(self, x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        """x [T, in_features] -> [T, out_features]; a row's result must not depend on its neighbours' values."""

    @abstractmethod
    def dequantize(self, state: Any) -> Tensor:
        """The weight [out_features, in_features] that `forward` multiplies by, in the compute dtype."""


class QuantMethod(ABC):
    """A quantization format. Chosen by the checkpoint's `quant_method`, or by the user's `quantization`."""

    checkpoint_names: ClassVar[frozenset[str]] = frozenset()
    """Values of `quantization_config.quant_method` that this method reads; empty: quantizes at load."""

    def __init__(self, init: QuantInit) -> None:
        """Raises UnsupportedModel for settings that it cannot honour."""
        self.init = init

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        """Whether these layers of one input, such as q, k and v, may be fused along their outputs.

        If not, `linear` is asked for each of them alone. False where their formats differ, or only
        some are quantized.
        """
        return True

    @abstractmethod
    def linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        """The layer's quantized form, or None: it stays unquantized.

        `sources` are the checkpoint's layers that are fused into `spec` along the outputs (itself,
        if nothing is fused). Raises UnsupportedModel for what it cannot read.
        """
