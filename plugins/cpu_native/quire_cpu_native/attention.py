"""Paged attention in C++: the cache is read where it lies.

A query's bits depend on its position and on what it sees, not on the batch, the chunk or the number of threads, so the
deterministic form costs nothing and there is no other.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from quire.plugin import (
    AttentionBackend,
    AttentionBatch,
    AttentionCaps,
    AttentionInit,
    AttentionLayer,
    GraphSupport,
    HeadNorm,
    KVCaches,
    QKVStep,
)
from torch import Tensor

from quire_cpu_native.native import SUFFIXES, HeadsFields, LayerFields, address, native, row_major, rows_of

MAX_GROUP = 64
"""Query heads of one KV head."""
MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Addresses of the step's tables, which are held here too. All else is read there, and nothing on the host."""

    tables: tuple[Tensor, ...]
    table: int
    table_width: int
    starts: int
    lengths: int
    num_reqs: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A layer's norms and caches in the kernel's form, and what they were made from."""

    layer: AttentionLayer
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    rotary_style: str
    kv: KVCaches
    half: int
    fields: HeadsFields
    place: int
    caches: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class LayerState:
    """A layer as the kernel reads it at `place`, and what it was made from."""

    layer: AttentionLayer
    kv: KVCaches
    fields: LayerFields
    place: int
    caches: tuple[int | None, ...]
    sinks: Tensor | None


class NativeAttention(AttentionBackend):
    """Scores and softmax in float32 for every dtype."""

    caps = AttentionCaps(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset(SUFFIXES),
        kv_dtypes=frozenset({"auto", "int8"}),
        features=frozenset({"causal", "sliding_window", "logit_softcap", "sinks", "v_head_dim"}),
        graph=GraphSupport.ANY,
        deterministic=True,
    )

    def __init__(self, init: AttentionInit) -> None:
        super().__init__(init)
        kernels = native(torch.get_num_threads())
        form = "int8" if init.kv_dtype == "int8" else ""
        self._attend = kernels.function("attention", init.dtype, form)
        self._prepare = kernels.function("prepare", init.dtype, form)
        self._layers: dict[int, LayerState] = {}
        self._prepared: dict[int, Prepared] = {}

    @classmethod
    def supports(cls, layer: AttentionLayer, dtype: torch.dtype, device_type: str, block_size: int) -> list[str]:
        reasons = super().supports(layer, dtype, device_type, block_size)
        if layer.num_heads > MAX_GROUP * layer.num_kv_heads:
            reasons.append(f"a KV head serves more than {MAX_GROUP} query heads")
        if layer.head_dim > MAX_HEAD_DIM:
            reasons.append(f"head size {layer.head_dim} is above {MAX_HEAD_DIM}")
        return reasons

    def prepare_qkv(self, step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
        layer, qkv, cos, sin = step.layer, step.qkv, step.cos, step.sin
        slots = step.batch.slot_mapping
        ready = self._heads(step)
        if ready is None or not (cos.is_contiguous() and sin.is_contiguous() and slots.is_contiguous()):
            return super().prepare_qkv(step)
        num_heads, heads, size = layer.num_heads, layer.num_heads + layer.num_kv_heads, layer.head_dim
        qkv, apart = rows_of(qkv, qkv.shape[1])
        tokens = qkv.shape[0]
        turned = qkv.new_empty(tokens, heads, size)
        self._prepare(
            ready.place,
            qkv.data_ptr(),
            apart,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            turned.data_ptr(),
            *ready.caches,
            tokens,
        )
        values = qkv[:, heads * size :].view(tokens, layer.num_kv_heads, layer.v_head_dim)
        return turned[:, :num_heads], turned[:, num_heads:], values

    def _heads(self, step: QKVStep) -> Prepared | None:
        """The layer's part of a fused preparation, kept from step to step; None if it cannot be fused."""
        kept = self._prepared.get(step.layer.layer_id)
        if (
            kept is not None
            and kept.kv is step.kv
            and kept.layer is step.layer
            and kept.q_norm is step.q_norm
            and kept.k_norm is step.k_norm
            and kept.rotary_style == step.rotary_style
            and kept.half == step.cos.shape[-1]
        ):
            return kept
        if not _can_fuse(step):
            return None
        layer, q_norm, k_norm, half = step.layer, step.q_norm, step.k_norm, step.cos.shape[-1]
        fields = HeadsFields(
            q_weight=address(q_norm.weight if q_norm else None),
            k_weight=address(k_norm.weight if k_norm else None),
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            half=half,
            neox=int(step.rotary_style == "neox"),
            q_eps=q_norm.eps if q_norm else 0.0,
            k_eps=k_norm.eps if k_norm else 0.0,
            q_offset=q_norm.weight_offset if q_norm else 0.0,
            k_offset=k_norm.weight_offset if k_norm else 0.0,
        )
        place, caches = ctypes.addressof(fields), _addresses(step.kv)
        made = Prepared(layer, q_norm, k_norm, step.rotary_style, step.kv, half, fields, place, caches)
        self._prepared[layer.layer_id] = made
        return made

    def plan(self, batch: AttentionBatch) -> StepPlan:
        table = row_major(batch.block_table)  # often some columns of a wider one
        starts, lengths = batch.query_start_loc.contiguous(), batch.seq_lens.contiguous()
        return StepPlan(
            tables=(table, starts, lengths),
            table=table.data_ptr(),
            table_width=table.stride(0),
            starts=starts.data_ptr(),
            lengths=lengths.data_ptr(),
            num_reqs=batch.num_reqs,
        )

    def forward(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        plan: StepPlan,
        out: Tensor,
    ) -> None:
        if q.stride(2) != 1 or q.stride(1) != layer.head_dim:
            q = q.contiguous()
        whole = out.is_contiguous()
        into = out if whole else torch.empty_like(out, memory_format=torch.contiguous_format)
        state = self._layer(layer, kv)
        self._attend(
            state.place,
            q.data_ptr(),
            q.stride(0),
            *state.caches,
            into.data_ptr(),
            plan.table,
            plan.table_width,
            plan.starts,
            plan.lengths,
            plan.num_reqs,
            out.shape[0],
        )
        if not whole:
            out.copy_(into)

    def _layer(self, layer: AttentionLayer, kv: KVCaches) -> LayerState:
        kept = self._layers.get(layer.layer_id)
        if kept is not None and kept.layer is layer and kept.kv is kv:
            return kept
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        fields = LayerFields(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            window=layer.sliding_window or 0,
            block_size=self.init.block_size,
            scale=layer.scale,
            softcap=layer.logit_softcap or 0.0,
            sinks=address(sinks),
        )
        made = LayerState(layer, kv, fields, ctypes.addressof(fields), _addresses(kv), sinks)
        self._layers[layer.layer_id] = made
        return made


def _can_fuse(step: QKVStep) -> bool:
    """Whether the layer's caches and norms are such as the kernel takes."""
    dtype = step.qkv.dtype
    norms = [norm.weight for norm in (step.q_norm, step.k_norm) if norm is not None]
    alike = all(each.dtype is dtype for each in norms) and step.cos.dtype is torch.float32
    return alike and all(each.is_contiguous() for each in (*step.kv, *norms))


def _addresses(kv: KVCaches) -> tuple[int | None, ...]:
    """Of keys, values, and the scales of both where they are int8."""
    keys, values, *scales = (cache.data_ptr() for cache in kv)
    return (keys, values, *(scales or (None, None)))
