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

TILE = 16
KV_PADDING = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """16 absolute query positions of one row.

    Attributes:
        start: first position of the tile.
        rows: which of the 16 are computed in this step, first and last + 1.
        tokens: the place of the first of them among the step's tokens.
        slots: int64 [N]; KV slots of positions 0 to N - 1, the null block's where there is none.
    """

    start: int
    rows: tuple[int, int]
    tokens: int
    slots: Tensor


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A step's tiles, and how many of its tokens are real."""

    tiles: tuple[Tile, ...]
    num_tokens: int


def plan_tiles(batch: AttentionBatch) -> TilePlan:
    """Cut the step's rows into tiles."""
    return TilePlan(tuple(_tiles(batch)), int(batch.query_start_loc_host[-1]))


def _tiles(batch: AttentionBatch) -> Iterator[Tile]:
    starts, lengths = batch.query_start_loc_host.tolist(), batch.seq_lens_host.tolist()
    for row in range(batch.num_reqs):
        query_len = starts[row + 1] - starts[row]
        first = lengths[row] - query_len
        for start in range(first // TILE * TILE, lengths[row], TILE):
            low, high = max(start, first), min(start + TILE, lengths[row])
            if low < high:
                yield Tile(start, (low - start, high - start), starts[row] + low - first, _slots(batch, row, start))


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
    out[plan.num_tokens :].zero_()


def _attend_tile(layer: AttentionLayer, queries: Tensor, kv: KVCaches, tile: Tile) -> Tensor:
    """[16, Hq, Dv] of queries [16, Hq, D]."""
    keys, values = (cache.view(-1, *cache.shape[2:])[tile.slots].float().transpose(0, 1) for cache in kv)
    width, heads = tile.slots.numel(), layer.num_heads
    group = heads // layer.num_kv_heads
    position = torch.arange(tile.start, tile.start + TILE)[:, None]
    key = torch.arange(width)
    seen = key <= position
    if layer.sliding_window is not None:
        seen = seen & (key > position - layer.sliding_window)
    # Behind the last computed position stands what other requests left there, NaN perhaps. Zeros in its
    # place change no bit of a real row, whose weights there are exactly zero.
    hidden = key >= tile.start + tile.rows[1]
    keys, values = keys.masked_fill(hidden[:, None], 0.0), values.masked_fill(hidden[:, None], 0.0)
    folded = queries.float().transpose(0, 1).reshape(layer.num_kv_heads, group * TILE, -1)
    scores = torch.bmm(folded, keys.transpose(1, 2)).view(heads, TILE, width) * layer.scale
    if layer.logit_softcap is not None:
        scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if layer.sinks is not None:
        # 64 columns, so that the softmax's length stays a multiple of its vector width.
        sinks = scores.new_full((heads, TILE, KV_PADDING), float("-inf"))
        sinks[..., 0] = layer.sinks.float()[:, None]
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., :width]
    result = torch.bmm(weights.reshape(layer.num_kv_heads, group * TILE, width), values)
    return result.view(heads, TILE, -1).transpose(0, 1).to(queries.dtype)
