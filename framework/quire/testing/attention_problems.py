"""Problems for attention backends with their solution: an oracle in float64 that shares no code with any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, AttentionLayer, HeadNorm, KVCaches, QKVStep, in_cache_dtype
from quire.testing.batches import BatchCase, make_batch

CASES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "prefill": ([7, 1, 19], [0, 0, 0]),
    "decode": ([1, 1, 1, 1, 1], [5, 16, 31, 0, 70]),
    "chunked": ([6, 9], [10, 33]),
    "mixed": ([1, 8, 1, 17], [40, 0, 15, 4]),
    "verification": ([3, 3, 3], [12, 29, 1]),
}
LAYERS: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "gqa": {"num_heads": 6, "num_kv_heads": 2},
    "mqa": {"num_heads": 4, "num_kv_heads": 1},
    "window": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 9},
    "softcap": {"num_heads": 4, "num_kv_heads": 2, "logit_softcap": 2.0},
    "sinks": {"num_heads": 4, "num_kv_heads": 2, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window and sinks": {"num_heads": 2, "num_kv_heads": 1, "sliding_window": 5, "sinks": torch.tensor([1.0, 0.0])},
    "alibi": {"num_heads": 4, "num_kv_heads": 2, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi, softcap, window": {
        "num_heads": 3,
        "num_kv_heads": 1,
        "alibi_slopes": torch.tensor([1.0, 0.1, 0.01]),
        "logit_softcap": 2.0,
        "sliding_window": 9,
    },
    "other v size": {"num_heads": 4, "num_kv_heads": 2, "v_head_dim": 16},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest absolute error for values of order one, by dtype."""
KV_TOLERANCE = {"fp8_e4m3": 0.15, "int8": 0.06}
"""What a cache's dtype may add to it: of 3 bits after the point, numbers up to 4 are off by up to 1/8; of 127 steps up
to a head's largest number, by up to 4/254, in values and in keys."""


def make_layer(name: str, head_dim: int = 32) -> AttentionLayer:
    """A layer of the table."""
    fields: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": head_dim, "scale": head_dim**-0.5} | LAYERS[name]
    return AttentionLayer(layer_id=0, **fields)


def oracle(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend | None = None) -> Tensor:
    """Attention of one request in float64: q [q, Hq, D] are the last of k [n, Hkv, D], v [n, Hkv, Dv].

    `backend`: over the keys that it says it sees.
    """
    count, length = q.shape[0], k.shape[0]
    out = torch.empty(count, layer.num_heads, layer.v_head_dim, dtype=torch.float64)
    group = layer.num_heads // layer.num_kv_heads
    for head in range(layer.num_heads):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        for row in range(count):
            position = length - count + row
            first = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
            at = torch.arange(first, position + 1)
            kept = None if backend is None else backend.sees(layer, torch.tensor([[position]]), at)
            at = at if kept is None else at[kept[0]]
            scores = keys[at] @ q[row, head].double() * layer.scale
            if layer.logit_softcap is not None:
                scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
            if layer.alibi_slopes is not None:
                scores = scores + layer.alibi_slopes[head].double() * (at - position)
            weights = scores.exp()
            total = weights.sum() + (layer.sinks[head].double().exp() if layer.sinks is not None else 0.0)
            out[row, head] = (weights / total) @ values[at]
    return out


def held_exactly(x: Tensor, stored: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers near x [.., D] that a cache of this dtype holds exactly; `scale`: of 8-bit floats."""
    if stored is not torch.int8:
        return in_cache_dtype(x / scale, stored).to(x.dtype) * scale
    codes = (x * 32).round().clamp(-127, 127)
    codes[..., 0] = 127  # the head's largest, so that its scale is 1/32
    return codes / 32


@dataclass
class Problem:
    """A batch with its tensors: each row's keys and values, and the queries of its new tokens."""

    layer: AttentionLayer
    case: BatchCase
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def make(
        cls,
        layer: AttentionLayer,
        lens: tuple[Sequence[int], Sequence[int]],
        dtype: torch.dtype,
        *,
        block_size: int = 16,
        seed: int = 0,
        padding: tuple[int, int] = (0, 0),
        stored: torch.dtype | None = None,
    ) -> Problem:
        """A random problem; `stored`: keys and values are numbers that this dtype holds exactly."""
        query_lens, context_lens = lens
        case = make_batch(
            query_lens, context_lens, block_size=block_size, pad_reqs=padding[0], pad_tokens=padding[1], seed=seed
        )
        generator = torch.Generator().manual_seed(seed + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        def draw_kv(size: int, count: int, scale: float) -> Tensor:
            drawn = draw(count, layer.num_kv_heads, size)
            return drawn if stored is None else held_exactly(drawn, stored, scale)

        totals = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
        return cls(
            layer,
            case,
            query_lens,
            context_lens,
            draw(case.batch.num_tokens, layer.num_heads, layer.head_dim),
            [draw_kv(layer.head_dim, total, layer.k_scale) for total in totals],
            [draw_kv(layer.v_head_dim, total, layer.v_scale) for total in totals],
        )

    def new_kv(self) -> tuple[Tensor, Tensor]:
        """k and v of this step's tokens, padding included."""
        padding = self.case.batch.num_tokens - sum(self.query_lens)
        pieces = []
        for rows in (self.keys, self.values):
            parts = [row[context:] for row, context in zip(rows, self.context_lens, strict=True)]
            pieces.append(torch.cat([*parts, rows[0].new_ones(padding, *rows[0].shape[1:])]))
        return pieces[0], pieces[1]

    def fill(self, backend: AttentionBackend, poison: float) -> KVCaches:
        """Caches that hold the rows' contexts; every slot that nobody owns holds `poison`."""
        specs = backend.kv_spec(self.layer, self.case.batch.block_size, backend.init.cache_dtype)
        device = self.q.device
        caches = tuple(
            torch.full((self.case.num_blocks, *spec.shape), poison, device=device).to(spec.dtype) for spec in specs
        )
        for cache in caches:
            cache[0].zero_()
        for row, context in enumerate(self.context_lens):
            if context:
                slots = self.case.slots(row, context).to(device)
                batch = dataclasses.replace(self.case.batch, slot_mapping=slots)
                backend.write_kv(self.layer, self.keys[row][:context], self.values[row][:context], caches, batch)
        return caches

    def expected(self, backend: AttentionBackend | None = None) -> list[Tensor]:
        """The oracle's result per row; with a backend, over the keys that it says it sees."""
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).tolist()
        return [
            oracle(self.layer, self.q[start : start + count], k, v, backend)
            for start, count, k, v in zip(starts, self.query_lens, self.keys, self.values, strict=False)
        ]


def make_step(
    backend: AttentionBackend,
    lens: tuple[Sequence[int], Sequence[int]],
    dtype: torch.dtype,
    *,
    norms: str,
    rotary_dim: int,
    style: Any = "neox",
) -> QKVStep:
    """A random step for the backend's first layer, over empty caches."""
    layer, block_size = backend.init.layers[0], backend.init.block_size
    case = make_batch(*lens, block_size=block_size)
    generator = torch.Generator().manual_seed(0)
    width = layer.num_heads * layer.head_dim + layer.num_kv_heads * (layer.head_dim + layer.v_head_dim)
    qkv = torch.randn(case.batch.num_tokens, width, generator=generator).to(dtype)
    angles = torch.randn(case.batch.num_tokens, rotary_dim // 2, generator=generator)
    offset = 1.0 if norms == "offset" else 0.0
    q_norm, k_norm = (
        HeadNorm(torch.rand(layer.head_dim, generator=generator).to(dtype), eps, offset)
        for eps in (1e-6, 1e-2 if norms == "unlike" else 1e-6)
    )
    kv = tuple(
        torch.zeros(case.num_blocks, *spec.shape, dtype=spec.dtype)
        for spec in backend.kv_spec(layer, block_size, backend.init.cache_dtype)
    )
    return QKVStep(
        layer=layer,
        qkv=qkv,
        cos=angles.cos(),
        sin=angles.sin(),
        kv=kv,
        batch=case.batch,
        rotary_style=style,
        q_norm=None if norms == "none" else q_norm,
        k_norm=None if norms in ("none", "one") else k_norm,
    )
