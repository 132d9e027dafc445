"""Attention whose result for a token is bitwise the same in whatever batch or chunk it is computed.

Matrix kernels choose their order of summation by the shapes of their operands, so the shapes are
made a function of a token's position alone: queries are computed in tiles of 16 absolute positions
(16k to 16k + 15), rows that are not there being zero, over KV padded to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from quire.plugin import AttentionBatch, AttentionLayer, KVCaches
from torch import Tensor
from torch.nn import functional

TILE = 16
KV_PADDING = 64
SPELT_OUT = frozenset({"logit_softcap", "sinks", "alibi"})
"""Features that torch's own attention lacks."""
Scale = Tensor | float
"""A cache's scale: one for each token and head, or one for all."""


@dataclass(frozen=True, slots=True)
class Tile:
    """16 absolute query positions of one row.

    Attributes:
        start: first position of the tile.
        rows: which of the 16 are computed in this step, first and last + 1.
        tokens: the place of the first of them among the step's tokens.
        slots: int64 [N]; KV slots of positions 0 to N - 1, the null block's where there is none.
        seen: by window, bool [16, N]; whether a query sees a position.
    """

    start: int
    rows: tuple[int, int]
    tokens: int
    slots: Tensor
    seen: dict[int | None, Tensor]


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A step's tiles, and how many of its tokens are real."""

    tiles: tuple[Tile, ...]
    num_tokens: int


def plan_tiles(batch: AttentionBatch, windows: frozenset[int | None]) -> TilePlan:
    """Cut the step's rows into tiles, for layers of these windows."""
    return TilePlan(tuple(_tiles(batch, windows)), int(batch.query_start_loc_host[-1]))


def _tiles(batch: AttentionBatch, windows: frozenset[int | None]) -> Iterator[Tile]:
    starts, lengths = batch.query_start_loc_host.tolist(), batch.seq_lens_host.tolist()
    for row in range(batch.num_reqs):
        query_len = starts[row + 1] - starts[row]
        first = lengths[row] - query_len
        for start in range(first // TILE * TILE, lengths[row], TILE):
            low, high = max(start, first), min(start + TILE, lengths[row])
            if low < high:
                slots = _slots(batch, row, start)
                seen = {window: _seen(start, slots.numel(), window) for window in windows}
                yield Tile(start, (low - start, high - start), starts[row] + low - first, slots, seen)


def _seen(start: int, width: int, window: int | None) -> Tensor:
    position = torch.arange(start, start + TILE)[:, None]
    key = torch.arange(width)
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def _slots(batch: AttentionBatch, row: int, start: int) -> Tensor:
    width = -(-(start + TILE) // KV_PADDING) * KV_PADDING
    position = torch.arange(width)
    block = position // batch.block_size
    table = batch.block_table[row]
    known = block < table.shape[0]
    return torch.where(known, table[block.clamp(max=table.shape[0] - 1)].long(), 0) * batch.block_size + (
        position % batch.block_size
    )


def run_tiles(layer: AttentionLayer, q: Tensor, kv: KVCaches, plan: TilePlan, out: Tensor) -> None:
    """Attention of every tile, one fixed-shape computation each."""
    for tile in plan.tiles:
        low, high = tile.rows
        queries = q.new_zeros(TILE, layer.num_heads, layer.head_dim)
        queries[low:high] = q[tile.tokens : tile.tokens + high - low]
        result = _attend_tile(layer, queries, kv, tile)
        out[tile.tokens : tile.tokens + high - low] = result[low:high]


def _attend_tile(layer: AttentionLayer, queries: Tensor, kv: KVCaches, tile: Tile) -> Tensor:
    """[16, Hq, Dv] of queries [16, Hq, D]."""
    keys, values = (_gather(cache, scale, tile, queries.dtype) for cache, scale in with_scales(layer, kv))
    group = layer.num_heads // layer.num_kv_heads
    folded = queries.transpose(0, 1).reshape(layer.num_kv_heads, group * TILE, layer.head_dim)
    seen = tile.seen[layer.sliding_window].repeat(group, 1)
    if not layer.features & SPELT_OUT:
        found = functional.scaled_dot_product_attention(
            folded[None], keys[None], values[None], attn_mask=seen[None, None], scale=layer.scale
        )
    else:
        found = _spelt_out(layer, folded, keys, values, seen, tile.start)
    return found.reshape(layer.num_heads, TILE, layer.v_head_dim).transpose(0, 1)


def with_scales(layer: AttentionLayer, kv: KVCaches) -> tuple[tuple[Tensor, Scale], tuple[Tensor, Scale]]:
    """Keys and values, with their scales: those of an int8 cache beside it, those of 8-bit floats the layer's."""
    keys, values, *beside = kv
    k_scale, v_scale = beside or layer.cache_scales(keys.dtype)
    return (keys, k_scale), (values, v_scale)


def scaled(cache: Tensor, scale: Scale, index: Tensor) -> Tensor:
    """What stands at `index` of dimension 0, times its scale."""
    found = cache.index_select(0, index)
    if isinstance(scale, Tensor):
        return found * scale.index_select(0, index)[..., None]
    return found if scale == 1.0 else found.float() * scale


def _gather(cache: Tensor, scale: Scale, tile: Tile, dtype: torch.dtype) -> Tensor:
    """[Hkv, N, D] in the compute dtype.

    Behind the last computed position stands what other requests left there, NaN perhaps. Zeros in its
    place change no bit of a real row, whose weights there are exactly zero.
    """
    scale = scale.flatten(0, 1) if isinstance(scale, Tensor) else scale
    found = scaled(cache.flatten(0, 1), scale, tile.slots).to(dtype)
    found[tile.start + tile.rows[1] :] = 0.0
    return found.transpose(0, 1)


def _spelt_out(
    layer: AttentionLayer, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, start: int
) -> Tensor:
    """[Hkv, G·16, Dv] with softcap, ALiBi and sinks: queries [Hkv, G·16, D], keys [Hkv, N, D], seen [G·16, N]."""
    width = keys.shape[1]
    scores = torch.bmm(queries.float(), keys.float().transpose(1, 2)) * layer.scale
    if layer.logit_softcap is not None:
        scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
    if layer.alibi_slopes is not None:
        distance = torch.arange(width) - torch.arange(start, start + TILE)[:, None]
        slopes = layer.alibi_slopes.float().view(layer.num_kv_heads, -1, 1, 1)
        scores = scores + (slopes * distance).flatten(1, 2)
    scores = scores.masked_fill(~seen, float("-inf"))
    if layer.sinks is not None:
        # 64 columns, so that the softmax's length stays a multiple of its vector width.
        sinks = scores.new_full((*scores.shape[:2], KV_PADDING), float("-inf"))
        sinks[..., 0] = layer.sinks.float().view(layer.num_kv_heads, -1).repeat_interleave(TILE, 1)
        scores = torch.cat((scores, sinks), -1)
    return torch.bmm(scores.softmax(-1)[..., :width], values.float()).to(queries.dtype)
