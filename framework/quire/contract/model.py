"""Models: an architecture's declaration, what it builds, and what its forward is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contract.attention import AttentionBackend, AttentionBatch, AttentionLayer, GraphSupport, KVCaches, QKVStep
from quire.contract.ops import LinearSpec, OpSpec
from quire.contract.quant import QuantLinear


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a forward pass needs beside its tokens. Passed explicitly through the layers.

    Attributes:
        backend: the attention backend.
        batch: the step's rows.
        plan: what the backend planned for them.
        kv: the caches, indexed by `AttentionLayer.layer_id`.
        wanted: int64 [R], at least one, ascending: the tokens whose hidden states will be read; None: all. A model may
            leave out the others once every layer's keys and values are in the cache.
    """

    backend: AttentionBackend
    batch: AttentionBatch
    plan: Any
    kv: tuple[KVCaches, ...]
    wanted: Tensor | None = None

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the cache, which already holds k and v; returns [T, Hq·Dv]."""
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        self.backend.forward(layer, q, k, v, self.kv[layer.layer_id], self.batch, self.plan, out)
        return out.flatten(1)

    def attend_qkv(self, step: QKVStep) -> Tensor:
        """Norm, rotate and cache the fused projection, then attend; returns [T, Hq·Dv]."""
        q, k, v = self.backend.prepare_qkv(step)
        return self.attend(step.layer, q, k, v)


class LayerFactory(ABC):
    """What a model asks for the parts that plugins supply. The loader implements it."""

    @abstractmethod
    def op(self, spec: OpSpec) -> Any:
        """The operation chosen for this spec, following the protocol of its kind."""

    @abstractmethod
    def quant_linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        """The quantized form of a linear layer, or None if it is stored unquantized."""

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        """Whether these layers of one input may be held as one, as `QuantMethod.may_fuse` says."""
        return True

    def quantizes(self, spec: LinearSpec) -> bool:
        """Whether `quant_linear` would give a quantized form of this layer; nothing is built that lasts."""
        return self.quant_linear(spec, (spec,)) is not None


def no_stored_rows(name: str) -> None:
    """Weights that come from elsewhere than files."""


@dataclass(frozen=True, slots=True)
class ModelInit:
    """All that a model is built from.

    Attributes:
        config: what the architecture's `config_from_hf` returned.
        device: where it runs.
        dtype: compute dtype.
        max_model_len: longest request, for the rotary tables.
        layers: where operations and quantized layers come from.
        deterministic: rows must not depend on their neighbours.
        checkpoint: folder of the checkpoint, for models that read more than tensors.
        stored_rows: for a stored matrix [N, M], by its checkpoint name: a function from indices int64 [T] on the
            host to its rows [T, M] in the stored dtype, read from the file at each call; None where it cannot be
            read so. For tables that are too large to be kept for a few rows per step. Each call is one of the
            operation `quire::stored_rows(ids, file, offset, columns, dtype, path)`, which a device that records
            steps may carry out in its own way.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    layers: LayerFactory
    deterministic: bool = False
    checkpoint: str = ""
    stored_rows: Callable[[str], Callable[[Tensor], Tensor] | None] = no_stored_rows


class CausalLM(nn.Module, ABC):
    """A decoder. Built on the meta device; weights arrive by name, then `finalize` packs them."""

    graph: GraphSupport = GraphSupport.NEVER
    """Which batches `forward` can run inside a captured graph, beside what attention and operations allow."""

    attention_layers: tuple[AttentionLayer, ...]
    vocab_size: int

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        """input_ids int64 [T], positions int64 [T] -> hidden states [T, H], the final norm applied.

        Where `ctx.wanted` is given, those of its R tokens alone, [R, H], will do.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, V] of a floating dtype. Nothing but the engine holds them: it may overwrite them."""

    @abstractmethod
    def load_weight(self, name: str, tensor: Tensor) -> bool:
        """Take one checkpoint tensor; False if the model has no place for that name.

        Raises UnsupportedModel if the shape does not fit. The tensor may be a view of a mapped file.
        """

    @abstractmethod
    def missing_weights(self) -> list[str]:
        """Checkpoint names that were expected and have not been loaded."""

    @abstractmethod
    def finalize(self) -> None:
        """Pack what was loaded, once, and let the unpacked tensors go."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An architecture.

    Attributes:
        architectures: values of the checkpoint's `architectures` that this spec serves; empty: a
            bridge that is asked (`why_not`) about any checkpoint.
        config_from_hf: reads the checkpoint's config.json once; raises UnsupportedModel naming the key.
        attention_layers: the layers that `build` will make, from the config alone, so that an
            attention backend can be chosen before anything is loaded.
        max_model_len: the longest sequence that the config allows.
        vocab_size: V of the config.
        build: makes the model.
        why_not: reasons why a given config.json cannot be served.
    """

    architectures: frozenset[str]
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    attention_layers: Callable[[Any], tuple[AttentionLayer, ...]]
    max_model_len: Callable[[Any], int]
    vocab_size: Callable[[Any], int]
    build: Callable[[ModelInit], CausalLM]
    why_not: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
