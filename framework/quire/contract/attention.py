"""Attention over a paged KV cache: the one abstract method a backend needs, and what it receives.

There is no prefill or decode phase. Query token j of row i stands at position
`seq_lens[i] - query_len[i] + j`; one formula serves prefill, chunked prefill, prefix hits,
decode and verification. Block 0 is a zeroed null block that no request owns: padding tokens are
written there and block-table padding may be dereferenced.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

KVCaches = tuple[Tensor, ...]
"""The cache tensors of one layer, in the order of `AttentionBackend.kv_spec`."""
KV_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8})
"""Names of the cache dtypes that are not the compute dtype, which is called `auto`. `int8` has a scale beside each
token's head, see `quantize_kv`."""
INT8_MAX = 127


class GraphSupport(IntEnum):
    """Which batches a component can serve inside a captured graph."""

    NEVER = 0
    UNIFORM = 1  # every real row has the same number of query tokens
    ANY = 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor; for a KV cache `shape` is that of one block, dimension 0 of the whole is the block."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The static facts of one attention layer.

    Attributes:
        layer_id: index into the step's KV caches.
        num_heads: query heads, Hq; a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads, Hkv.
        head_dim: size D of a query or key head.
        v_head_dim: size Dv of a value head.
        scale: factor on q·k before softcap and softmax.
        sliding_window: how many tokens a query sees, itself included; None: all before it.
        logit_softcap: c in c·tanh(score/c); None: no cap.
        sinks: per-head logits [Hq] that take part in the softmax's denominator; None: none.
        alibi_slopes: float32 [Hq]; slope · (key position - query position) is added to a score, after scale and
            softcap (Press et al. 2022); None: nothing.
        k_scale: a cache of 8-bit floats holds k / k_scale; others hold k. As the checkpoint was calibrated.
        v_scale: the same for v.
    """

    layer_id: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    sliding_window: int | None = None
    logit_softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def cache_scales(self, dtype: torch.dtype) -> tuple[float, float]:
        """What elements of caches of this dtype are multiplied by to give k and v: 1 except for 8-bit floats."""
        return (self.k_scale, self.v_scale) if is_float8(dtype) else (1.0, 1.0)

    @property
    def features(self) -> frozenset[str]:
        """The features that a backend must list in its caps to serve this layer."""
        optional = {
            "sliding_window": self.sliding_window is not None,
            "logit_softcap": self.logit_softcap is not None,
            "sinks": self.sinks is not None,
            "alibi": self.alibi_slopes is not None,
            "v_head_dim": self.v_head_dim != self.head_dim,
        }
        return frozenset({"causal"} | {name for name, needed in optional.items() if needed})


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's rows, after padding: R rows, T tokens.

    Attributes:
        num_reqs: R, padding rows included.
        num_tokens: T, padding tokens included.
        uniform_query_len: q if every real row has q query tokens, else 0.
        max_query_len: upper bound of the rows' query lengths.
        max_seq_len: upper bound of `seq_lens`.
        block_size: slots per KV block.
        query_start_loc: int32 [R+1], device; padding rows repeat the end.
        seq_lens: int32 [R], device; context length including this step's tokens, 0 for a padding row.
        block_table: int32 [R, max_blocks], device; unused entries are 0.
        slot_mapping: int64 [T], device; block·block_size + offset, always in range.
        query_start_loc_host: CPU mirror of `query_start_loc`.
        seq_lens_host: CPU mirror of `seq_lens`.
        host_exact: False where the host's lengths are only upper bounds.
    """

    num_reqs: int
    num_tokens: int
    uniform_query_len: int
    max_query_len: int
    max_seq_len: int
    block_size: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    query_start_loc_host: Tensor
    seq_lens_host: Tensor
    host_exact: bool = True


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm over each head: weight [D], eps, and the constant added to the weight (Gemma adds 1)."""

    weight: Tensor
    eps: float
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class QKVStep:
    """What surrounds attention in one layer and step, for a backend that fuses it.

    Attributes:
        layer: the layer's facts.
        qkv: [T, Hq·D + Hkv·D + Hkv·Dv], the fused projection, heads of q, then k, then v.
        cos: float32 [T, rotary_dim/2], already gathered at the tokens' positions.
        sin: the same of the sine.
        rotary_style: `neox` pairs element i with i + rotary_dim/2, `gptj` pairs 2i with 2i + 1.
        q_norm: norm over each query head before rotation, or None.
        k_norm: the same for keys.
        kv: the layer's caches.
        batch: the step's rows.
    """

    layer: AttentionLayer
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    kv: KVCaches
    batch: AttentionBatch
    rotary_style: Literal["neox", "gptj"] = "neox"
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None


@dataclass(frozen=True, slots=True)
class AttentionCaps:
    """What a backend can do; anything not listed is passed over with a reason.

    Attributes:
        device_types: torch device types.
        dtypes: dtypes of q, k, v and out.
        kv_dtypes: names of cache dtypes: `auto`, the compute dtype, and those of `KV_DTYPES`.
        head_dims: allowed head sizes; None: any.
        block_sizes: a block size must be a multiple of one of these.
        features: see `AttentionLayer.features`.
        graph: which batches may run inside a captured graph.
        deterministic: True if a row's result is bitwise independent of the rest of the batch, of
            chunking and of prefix hits when `AttentionInit.deterministic` is set.
        needs_exact_host_lens: True if `plan` reads the host lengths as exact.
        kv_tolerance: largest absolute error that caches which hold less than their dtype says add, for the
            conformance kit.
    """

    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    kv_dtypes: frozenset[str] = frozenset({"auto"})
    head_dims: frozenset[int] | None = None
    block_sizes: tuple[int, ...] = (1,)
    features: frozenset[str] = frozenset({"causal"})
    graph: GraphSupport = GraphSupport.NEVER
    deterministic: bool = False
    needs_exact_host_lens: bool = False
    kv_tolerance: float = 0.0

    def __post_init__(self) -> None:
        """Raises TypeError for what would only be found out much later: text where a set is needed."""
        kinds = {"device_types": str, "dtypes": torch.dtype, "kv_dtypes": str, "features": str}
        examples = {"device_types": "'cpu'", "dtypes": "torch.float32", "kv_dtypes": "'auto'", "features": "'causal'"}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, frozenset) or not all(isinstance(item, kind) for item in value):
                raise TypeError(f"AttentionCaps.{name} is {value!r}; write frozenset({{{examples[name]}}})")


@dataclass(frozen=True, slots=True)
class AttentionInit:
    """All that a backend is constructed from.

    Attributes:
        device: where q, k, v and the caches live.
        dtype: compute dtype.
        layers: the layers it will serve.
        block_size: slots per KV block.
        max_num_reqs: largest R of any batch.
        max_num_tokens: largest T of any batch.
        max_blocks_per_req: width of the block table.
        deterministic: results must be bitwise independent of batching and chunking.
        options: the validated instance of `Provider.options`, or None.
        kv_dtype: name of the cache's dtype, one of `AttentionCaps.kv_dtypes`.
    """

    device: torch.device
    dtype: torch.dtype
    layers: tuple[AttentionLayer, ...]
    block_size: int
    max_num_reqs: int
    max_num_tokens: int
    max_blocks_per_req: int
    deterministic: bool = False
    options: Any = None
    kv_dtype: str = "auto"

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the cache's elements."""
        return kv_cache_dtype(self.kv_dtype, self.dtype)


class AttentionBackend(ABC):
    """Paged attention. One instance per engine; no state outside the instance."""

    caps: ClassVar[AttentionCaps]

    def __init__(self, init: AttentionInit) -> None:
        """Allocate whatever persists here: inside a graph nothing may be allocated per step."""
        self.init = init

    @classmethod
    def supports(cls, layer: AttentionLayer, dtype: torch.dtype, device_type: str, block_size: int) -> list[str]:
        """Reasons why this layer cannot be served; empty if it can. Derived from `caps`."""
        caps, reasons = cls.caps, []
        if device_type not in caps.device_types:
            reasons.append(f"device {device_type!r} is not in its caps.device_types, {sorted(caps.device_types)}")
        if dtype not in caps.dtypes:
            reasons.append(f"dtype {dtype} is not one of {sorted(map(str, caps.dtypes))}")
        if caps.head_dims is not None and layer.head_dim not in caps.head_dims:
            reasons.append(f"head size {layer.head_dim} is not one of {sorted(caps.head_dims)}")
        if not any(block_size % size == 0 for size in caps.block_sizes):
            reasons.append(f"block size {block_size} is not a multiple of one of {caps.block_sizes}")
        if missing := sorted(layer.features - caps.features):
            alike = [name for word in missing for name in difflib.get_close_matches(word, caps.features, n=1)]
            meant = f", which say {alike}" if alike else ""
            reasons.append(f"features {missing} are not in its caps.features{meant}")
        return reasons

    @classmethod
    def kv_spec(cls, layer: AttentionLayer, block_size: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """The layer's cache tensors, shapes per block; one block is contiguous in each.

        Args:
            layer: the layer's facts. block_size: slots per block.
            dtype: of the cache's elements: the compute dtype, or one that the caps list (`AttentionInit.cache_dtype`).
                For int8 the float32 scales of keys and of values, one for each token and head, stand behind them.
        """
        elements = (
            TensorSpec("k", (block_size, layer.num_kv_heads, layer.head_dim), dtype),
            TensorSpec("v", (block_size, layer.num_kv_heads, layer.v_head_dim), dtype),
        )
        if dtype is not torch.int8:
            return elements
        scales = (block_size, layer.num_kv_heads)
        return (
            *elements,
            TensorSpec("k_scale", scales, torch.float32),
            TensorSpec("v_scale", scales, torch.float32),
        )

    def write_kv(self, layer: AttentionLayer, k: Tensor, v: Tensor, kv: KVCaches, batch: AttentionBatch) -> None:
        """Store k [T, Hkv, D] and v [T, Hkv, Dv] in the slots of `batch.slot_mapping`.

        8-bit floats hold `layer.k_scale` and `layer.v_scale` times less; what is beyond their range then becomes the
        largest number that they hold.
        """
        if kv[0].dtype is torch.int8:
            (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
            written: tuple[Tensor, ...] = (k, v, k_scale, v_scale)
        else:
            scales = layer.cache_scales(kv[0].dtype)
            written = tuple(
                x if scale == 1.0 else x.float() * (1 / scale) for x, scale in zip((k, v), scales, strict=True)
            )
        for cache, value in zip(kv, written, strict=True):
            stored = in_cache_dtype(value, cache.dtype)
            if cache.dtype.itemsize == 1:  # torch indexes bytes, but no 8-bit floats
                cache, stored = cache.view(torch.uint8), stored.view(torch.uint8)
            cache.view(-1, *cache.shape[2:]).index_copy_(0, batch.slot_mapping, stored)

    def prepare_qkv(self, step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection, norm, rotate, write the cache; returns q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv].

        The default composes the reference operations. An override fuses them, and the conformance
        kit holds it against this one.
        """
        q, k, v = split_qkv(step)
        q = apply_rotary(head_norm(q, step.q_norm), step.cos, step.sin, step.rotary_style)
        k = apply_rotary(head_norm(k, step.k_norm), step.cos, step.sin, step.rotary_style)
        self.write_kv(step.layer, k, v, step.kv, step.batch)
        return q, k, v

    def sees(self, layer: AttentionLayer, query: Tensor, key: Tensor) -> Tensor | None:
        """Which keys queries attend to, beyond what `layer` says; None, the default: all that it allows.

        A backend that leaves keys out on purpose says here which it keeps. Quire then warns at the start
        that results are not the model's, and the conformance kit expects exact attention over these keys.

        Args:
            layer: the layer's facts.
            query: int64 [q, 1], positions of queries. key: int64 [k], positions of keys.

        Returns:
            bool [q, k], or None. A query must see its own position.
        """
        return None

    def plan(self, batch: AttentionBatch) -> Any:
        """Prepare one step for all layers, outside any graph, after padding.

        For one graph key it must return the same addresses, shapes and Python scalars every time.
        """
        return None

    @abstractmethod
    def forward(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        plan: Any,
        out: Tensor,
    ) -> None:
        """Write attention's result into `out` [T, Hq, Dv]; the cache already holds this step's k and v.

        Rows of padding tokens may hold anything finite. The cache must not be written.

        Args:
            layer: the layer's facts.
            q: [T, Hq, D]. k: [T, Hkv, D]. v: [T, Hkv, Dv], this step's tokens only.
            kv: the layer's caches.
            batch: the step's rows.
            plan: what `plan` returned for this step.
            out: [T, Hq, Dv], preallocated, not initialised.
        """


def kv_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a cache: of a name of `KV_DTYPES`, or for `auto` the compute dtype."""
    return dtype if name == "auto" else KV_DTYPES[name]


def is_float8(dtype: torch.dtype) -> bool:
    """Whether these are floats of 8 bits."""
    return dtype.itemsize == 1 and dtype.is_floating_point


def in_cache_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of this dtype holds it, of 8-bit floats without their scales."""
    if is_float8(dtype):  # torch before 2.13 makes NaN of what is out of range
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Heads x [T, H, D] as int8 codes [T, H, D] with float32 scales [T, H]: x is about code · scale.

    The largest element of a head becomes 127 or -127; others are rounded to the nearest code, ties to even. A head
    without an element above 1e-30 becomes zeros.
    """
    wide = x.float()
    largest = wide.abs().amax(-1)
    inverse = torch.where(largest > 1e-30, INT8_MAX / largest, 0.0)
    codes = (wide * inverse[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), largest / INT8_MAX


def split_qkv(step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the fused projection as q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv]."""
    layer = step.layer
    sizes = [
        layer.num_heads * layer.head_dim,
        layer.num_kv_heads * layer.head_dim,
        layer.num_kv_heads * layer.v_head_dim,
    ]
    q, k, v = torch.split(step.qkv, sizes, dim=-1)
    return (
        q.view(-1, layer.num_heads, layer.head_dim),
        k.view(-1, layer.num_kv_heads, layer.head_dim),
        v.view(-1, layer.num_kv_heads, layer.v_head_dim),
    )


def head_norm(x: Tensor, norm: HeadNorm | None) -> Tensor:
    """RMS norm over the last dimension in float32 (Zhang and Sennrich 2019), result in x's dtype."""
    if norm is None:
        return x
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight_offset:
        return (wide * (norm.weight.float() + norm.weight_offset)).to(x.dtype)
    return wide.to(x.dtype) * norm.weight


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [T, H, D] by cos, sin [T, rotary_dim/2]; the rest passes through."""
    half = cos.shape[-1]
    if half == 0:
        return x
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    if style == "neox":
        first, second = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)
