"""The attention backend: what is allocated once, planned per step, and launched per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from quire.plugin import (
    AttentionBackend,
    AttentionBatch,
    AttentionCaps,
    AttentionInit,
    AttentionLayer,
    ConfigError,
    GraphSupport,
    KVCaches,
    QKVStep,
)
from torch import Tensor

from quire_cuda_paged.kernels import combine_kernel, paged_attention_kernel, plan_kernel
from quire_cuda_paged.prepare import can_fuse, fused_prepare_qkv
from quire_cuda_paged.tuning import Launch, Tuning, tuning_for

MIN_TILES = 2
"""Tiles of the shortest part: splitting further costs more in `combine_kernel` than it gains."""
FIRST_WITH_FP8 = (9, 0)
"""Compute capability from which Triton converts 8-bit floats to bfloat16 (for 8.9 its code does not assemble)."""
MIN_DIM = 16
"""Smallest side of a matrix that Triton multiplies."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layer's launches depend on, beside its features."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Workspace:
    """What persists for the layers of one shape.

    Attributes:
        tuning: how to launch. decode_queries: most query tokens of a row that is served by the decode shape.
        target: parts that the KV of a decode step is cut into, about.
        split_start: int32 [max rows + 1]. chunk: int32 [1]. parts, lse: float32, see `paged_attention_kernel`.
    """

    tuning: Tuning
    decode_queries: int
    target: int
    split_start: Tensor
    chunk: Tensor
    parts: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step, for each shape of layer: how many of its rows, the first ones, are served by the decode shape."""

    num_decodes: dict[Shape, int]


class CudaPagedAttention(AttentionBackend):
    """See `kernels`. Decode rows and prefill rows of one step are two launches of the same source."""

    caps = AttentionCaps(
        device_types=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        kv_dtypes=frozenset({"auto", "fp8_e4m3"}),
        features=frozenset({"causal", "sliding_window", "logit_softcap", "sinks", "v_head_dim", "alibi"}),
        graph=GraphSupport.UNIFORM,
    )

    def __init__(self, init: AttentionInit) -> None:
        super().__init__(init)
        self._capability, self._num_multiprocessors = _machine(init.device)
        if init.kv_dtype != "auto" and self._capability < FIRST_WITH_FP8:
            raise ConfigError(
                f"kv_cache_dtype is {init.kv_dtype!r}; this GPU has compute capability "
                f"{'.'.join(map(str, self._capability))}, and {'.'.join(map(str, FIRST_WITH_FP8))} is needed",
                remedy="leave kv_cache_dtype at auto",
            )
        self._workspaces = {shape: self._workspace(shape) for shape in {shape_of(layer) for layer in init.layers}}
        self._sinks = _per_layer(init, "sinks")
        self._slopes = _per_layer(init, "alibi_slopes")

    def prepare_qkv(self, step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
        return fused_prepare_qkv(step) if can_fuse(step) else super().prepare_qkv(step)

    def plan(self, batch: AttentionBatch) -> StepPlan:
        lengths = batch.query_start_loc_host.diff()
        counts = {shape: _num_leading(lengths, space.decode_queries) for shape, space in self._workspaces.items()}
        for shape, space in self._workspaces.items():
            if counts[shape]:
                plan_kernel[(1,)](
                    batch.seq_lens,
                    space.split_start,
                    space.chunk,
                    counts[shape],
                    space.target,
                    TILE=space.tuning.decode.tile,
                    MIN_TILES=MIN_TILES,
                    ROWS=triton.next_power_of_2(self.init.max_num_reqs),
                )
        return StepPlan(counts)

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
        shape = shape_of(layer)
        num_decodes = plan.num_decodes[shape]
        has_prefills = num_decodes < batch.num_reqs
        if num_decodes:
            self._launch(layer, q, kv, batch, out, (0, num_decodes), split=True, is_last=not has_prefills)
        if has_prefills:
            self._launch(layer, q, kv, batch, out, (num_decodes, batch.num_reqs), split=False, is_last=True)

    def _launch(
        self,
        layer: AttentionLayer,
        q: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        out: Tensor,
        rows: tuple[int, int],
        *,
        split: bool,
        is_last: bool,
    ) -> None:
        """Serve the rows [first, last); the last launch of a step clears the padding tokens too."""
        (first, last), shape = rows, shape_of(layer)
        space = self._workspaces[shape]
        launch = space.tuning.decode if split else space.tuning.prefill
        block_m = _block_m(launch, shape.group)
        keys, values = kv
        num_rows = last - first
        if split:
            work = num_rows + space.target
        else:
            # Every row may leave one block half empty; no length is asked for that only the device knows.
            work = (batch.num_tokens - int(batch.query_start_loc_host[first])) // (block_m // shape.group) + num_rows
        query_start = batch.query_start_loc[first:]
        paged_attention_kernel[(work, shape.num_kv_heads)](
            out,
            space.parts,
            space.lse,
            q,
            keys,
            values,
            batch.block_table[first:],
            batch.seq_lens[first:],
            query_start,
            space.split_start,
            space.chunk,
            self._sinks.get(layer.layer_id, space.lse),
            self._slopes.get(layer.layer_id, space.lse),
            batch.query_start_loc[batch.num_reqs :],
            num_rows,
            batch.num_tokens if is_last else 0,
            layer.scale,
            layer.logit_softcap or 0.0,
            batch.block_table.shape[1],
            *(tensor.stride(0) for tensor in (batch.block_table, q, out)),
            *keys.stride()[:3],
            *values.stride()[:3],
            **_sizes(shape),
            BLOCK_SIZE=batch.block_size,
            BLOCK_M=block_m,
            TILE=launch.tile,
            SPLIT=split,
            WINDOW=layer.sliding_window or 0,
            SOFTCAP=layer.logit_softcap is not None,
            SINKS=layer.sinks is not None,
            ALIBI=layer.alibi_slopes is not None,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if split:
            combine_kernel[(num_rows, shape.num_heads)](
                out,
                space.parts,
                space.lse,
                query_start,
                space.split_start,
                out.stride(0),
                HEADS=shape.num_heads,
                DV=shape.v_head_dim,
                DV_PAD=_padded(shape.v_head_dim),
                BLOCK_Q=block_m // shape.group,
            )

    def _workspace(self, shape: Shape) -> Workspace:
        """Everything that must not be allocated per step, for the largest batch."""
        device, rows = self.init.device, self.init.max_num_reqs
        d_pad, dv_pad = _padded(shape.head_dim), _padded(shape.v_head_dim)
        tuning = tuning_for(self._capability, max(d_pad, dv_pad), 8 * self.init.cache_dtype.itemsize)
        decode_queries = _block_m(tuning.decode, shape.group) // shape.group
        target = max(1, self._num_multiprocessors * tuning.waves // shape.num_kv_heads)
        items = (rows + target) * shape.num_heads * decode_queries
        return Workspace(
            tuning=tuning,
            decode_queries=decode_queries,
            target=target,
            split_start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            chunk=torch.zeros(1, dtype=torch.int32, device=device),
            parts=torch.empty(items, dv_pad, dtype=torch.float32, device=device),
            lse=torch.empty(max(items, shape.num_heads), dtype=torch.float32, device=device),
        )


def _per_layer(init: AttentionInit, name: str) -> dict[int, Tensor]:
    """float32 [Hq] of the layers that have such a tensor, by layer id."""
    found = ((layer.layer_id, getattr(layer, name)) for layer in init.layers)
    return {layer_id: tensor.float() for layer_id, tensor in found if tensor is not None}


def shape_of(layer: AttentionLayer) -> Shape:
    """What the layer's launches depend on."""
    return Shape(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim)


def _sizes(shape: Shape) -> dict[str, int]:
    """The shape as the kernel's compile-time arguments."""
    return {
        "HEADS": shape.num_heads,
        "GROUP": shape.group,
        "D": shape.head_dim,
        "D_PAD": _padded(shape.head_dim),
        "DV": shape.v_head_dim,
        "DV_PAD": _padded(shape.v_head_dim),
    }


def _padded(size: int) -> int:
    """A head size as the kernel's matrices hold it."""
    return max(MIN_DIM, int(triton.next_power_of_2(size)))


def _block_m(launch: Launch, group: int) -> int:
    """Query rows of a program: at least one token of a large group."""
    return max(launch.block_m, int(triton.next_power_of_2(group)))


def _num_leading(lengths: Tensor, most: int) -> int:
    """How many of the first rows have at most so many query tokens."""
    longer = (lengths > most).nonzero()
    return int(longer[0]) if longer.numel() else lengths.numel()


def _machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, number of multiprocessors). On a CPU, where Triton interprets, those of a small GPU."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
