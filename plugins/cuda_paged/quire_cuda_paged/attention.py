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
    """What a layer's plan and buffers depend on. `window`: tokens that a query sees; 0: all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Workspace:
    """What persists for the layers of one shape: how to launch, and where `plan_kernel` writes.

    Attributes:
        tuning: how to launch. target: parts that the KV of a step's decode rows is cut into, about.
        decode_block: query rows of a program of the decode shape. prefill_block: of the prefill shape.
        decode_queries: most query tokens of a row that is served by the decode shape.
        split_start, block_start: int32 [max rows + 1]. chunk: int32 [1].
    """

    tuning: Tuning
    target: int
    decode_block: int
    prefill_block: int
    decode_queries: int
    split_start: Tensor
    block_start: Tensor
    chunk: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step, for each shape of layer: its launches, True for the decode shape, False for the prefill shape."""

    launches: dict[Shape, tuple[bool, ...]]


class CudaPagedAttention(AttentionBackend):
    """See `kernels`. Decode rows and prefill rows of one step are two launches of the same source.

    Which of them a step needs follows from its sizes alone; which rows each serves is decided on the device.
    """

    caps = AttentionCaps(
        device_types=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        kv_dtypes=frozenset({"auto", "fp8_e4m3"}),
        features=frozenset({"causal", "sliding_window", "logit_softcap", "sinks", "v_head_dim", "alibi"}),
        graph=GraphSupport.ANY,
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
        # Layers run one after another: all of them put their parts into the same place.
        items = {shape: self._num_items(shape, space) for shape, space in self._workspaces.items()}
        sizes = [count * _padded(shape.v_head_dim) for shape, count in items.items()]
        self._parts = torch.empty(max(sizes), dtype=torch.float32, device=init.device)
        self._lse = torch.empty(max(items.values()), dtype=torch.float32, device=init.device)
        self._sinks = _per_layer(init, "sinks")
        self._slopes = _per_layer(init, "alibi_slopes")

    def prepare_qkv(self, step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
        return fused_prepare_qkv(step) if can_fuse(step) else super().prepare_qkv(step)

    def plan(self, batch: AttentionBatch) -> StepPlan:
        for shape, space in self._workspaces.items():
            plan_kernel[(1,)](
                batch.query_start_loc,
                batch.seq_lens,
                space.split_start,
                space.block_start,
                space.chunk,
                batch.num_reqs,
                space.target,
                DECODE_QUERIES=space.decode_queries,
                BLOCK_Q=space.prefill_block // shape.group,
                TILE=space.tuning.decode.tile,
                MIN_TILES=MIN_TILES,
                WINDOW=shape.window,
                ROWS=triton.next_power_of_2(self.init.max_num_reqs),
            )
        length = batch.uniform_query_len
        return StepPlan(
            {
                shape: (length <= space.decode_queries,) if length else (True, False)
                for shape, space in self._workspaces.items()
            }
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
        launches = plan.launches[shape_of(layer)]
        for split in launches:
            self._launch(layer, q, kv, batch, out, split=split, is_first=split is launches[0])

    def _launch(
        self,
        layer: AttentionLayer,
        q: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        out: Tensor,
        *,
        split: bool,
        is_first: bool,
    ) -> None:
        """Serve the decode rows (`split`) or the others; the first launch of a step clears the padding tokens too."""
        shape = shape_of(layer)
        space = self._workspaces[shape]
        launch = space.tuning.decode if split else space.tuning.prefill
        block_m = space.decode_block if split else space.prefill_block
        keys, values = kv
        k_scale, v_scale = layer.cache_scales(keys.dtype)
        paged_attention_kernel[(_grid(batch, shape, space, split), shape.num_kv_heads)](
            out,
            self._parts,
            self._lse,
            q,
            keys,
            values,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            space.split_start if split else space.block_start,
            space.chunk,
            self._sinks.get(layer.layer_id, self._lse),
            self._slopes.get(layer.layer_id, self._lse),
            batch.num_reqs,
            batch.num_tokens if is_first else 0,
            layer.scale * k_scale,
            layer.logit_softcap or 0.0,
            v_scale,
            batch.block_table.shape[1],
            *(tensor.stride(0) for tensor in (batch.block_table, q, out)),
            *keys.stride()[:3],
            *values.stride()[:3],
            **_sizes(shape),
            BLOCK_SIZE=batch.block_size,
            BLOCK_M=block_m,
            TILE=launch.tile,
            SPLIT=split,
            WINDOW=shape.window,
            SOFTCAP=layer.logit_softcap is not None,
            SINKS=layer.sinks is not None,
            ALIBI=layer.alibi_slopes is not None,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if split:
            combine_kernel[(batch.num_reqs, shape.num_heads)](
                out,
                self._parts,
                self._lse,
                batch.query_start_loc,
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
        kv_bits, exact = 8 * self.init.cache_dtype.itemsize, self.init.dtype is torch.float32
        tuning = tuning_for(self._capability, max(d_pad, dv_pad), kv_bits, exact=exact)
        decode_block = _block_m(tuning.decode, shape.group)
        return Workspace(
            tuning=tuning,
            target=max(1, self._num_multiprocessors * tuning.waves // shape.num_kv_heads),
            decode_block=decode_block,
            prefill_block=_block_m(tuning.prefill, shape.group),
            decode_queries=decode_block // shape.group,
            split_start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            block_start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            chunk=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def _num_items(self, shape: Shape, space: Workspace) -> int:
        """Vectors that the parts of the largest step are made of."""
        return (self.init.max_num_reqs + space.target) * shape.num_heads * space.decode_queries


def _grid(batch: AttentionBatch, shape: Shape, space: Workspace, split: bool) -> int:
    """Programs that are enough for any step of this size; those without work end at once."""
    if split:
        return batch.num_reqs + space.target
    # Every row may leave one block half empty. A row that is served here has more tokens than a decode row.
    most_rows = min(batch.num_reqs, batch.num_tokens // (space.decode_queries + 1))
    return batch.num_tokens // (space.prefill_block // shape.group) + most_rows


def _per_layer(init: AttentionInit, name: str) -> dict[int, Tensor]:
    """float32 [Hq] of the layers that have such a tensor, by layer id."""
    found = ((layer.layer_id, getattr(layer, name)) for layer in init.layers)
    return {layer_id: tensor.float() for layer_id, tensor in found if tensor is not None}


def shape_of(layer: AttentionLayer) -> Shape:
    """What the layer's launches depend on."""
    return Shape(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim, layer.sliding_window or 0)


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


def _machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, number of multiprocessors). On a CPU, where Triton interprets, those of a small GPU."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
