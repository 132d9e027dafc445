"""Sorts a step's rows into groups that one call of attention can serve, once per step and window.

A row with many query tokens is cut into pieces, so that early queries do not look at late keys only
to mask them. Pieces with the same number of queries and about the same number of KV blocks form a
group, up to a size whose gathered KV stays in the processor's cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from quire.plugin import AttentionBatch
from torch import Tensor

MAX_QUERIES = 128
"""Query tokens of a piece."""
MAX_PADDING = 1.5
"""A group's longest piece may have this many times the blocks of its shortest: padding stays under a third."""
MAX_GATHERED = 2**22
"""Elements of one gathered cache tensor. Above 32 MB the allocator asks the system for fresh pages every time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Query tokens of one row that are computed together.

    Attributes:
        row: the row in the batch.
        token: place of the first query among the step's tokens.
        query_len: number of queries.
        position: position of the first query.
        first_block: first KV block that any of them sees, and how many: num_blocks.
    """

    row: int
    token: int
    query_len: int
    position: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Group:
    """B pieces with q query tokens each, over N gathered KV positions.

    Attributes:
        num_rows: B.
        query_len: q.
        tokens: int64 [B·q]; places of the queries among the step's T tokens.
        blocks: int64 [B·(N / block_size)]; the KV blocks, piece after piece, null blocks at their ends.
        stale: int64; places among the B·N gathered positions that hold another request's leavings.
        seen: bool [B, 1, G·q, N]; whether a query sees a position. The G query heads that share a KV
            head stand one after another, as if they were more queries.
        distance: float32 [B, q, N]; key position less query position, if the shape asks for it.
    """

    num_rows: int
    query_len: int
    tokens: Tensor
    blocks: Tensor
    stale: Tensor
    seen: Tensor
    distance: Tensor | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layer's groups depend on.

    Attributes:
        window: its sliding window. heads_per_kv: G. elements: of K or V, per position.
        needs_distance: whether scores depend on how far a key is away.
    """

    window: int | None
    heads_per_kv: int
    elements: int
    needs_distance: bool = False


def make_groups(batch: AttentionBatch, shape: Shape) -> tuple[Group, ...]:
    """The groups of a step for layers of one shape; host lengths must be exact."""
    bins: dict[int, list[Piece]] = defaultdict(list)
    for piece in _pieces(batch, shape.window):
        bins[piece.query_len].append(piece)
    limit = max(1, MAX_GATHERED // (shape.elements * batch.block_size))
    return tuple(
        _group(batch, chosen, shape) for pieces in bins.values() for chosen in _similar(pieces, limit_blocks=limit)
    )


def _pieces(batch: AttentionBatch, window: int | None) -> Iterator[Piece]:
    starts, lengths, size = batch.query_start_loc_host.tolist(), batch.seq_lens_host.tolist(), batch.block_size
    for row, length in enumerate(lengths):
        before = length - (starts[row + 1] - starts[row])
        for position in range(before, length, MAX_QUERIES):
            count = min(MAX_QUERIES, length - position)
            first = 0 if window is None else max(0, position - window + 1) // size
            last = -(-(position + count) // size)
            yield Piece(row, starts[row] + position - before, count, position, first, last - first)


def _similar(pieces: list[Piece], *, limit_blocks: int) -> Iterator[list[Piece]]:
    rest = sorted(pieces, key=lambda piece: piece.num_blocks, reverse=True)
    while rest:
        longest = rest[0].num_blocks
        size = max(1, limit_blocks // longest)
        size = next((i for i, piece in enumerate(rest[:size]) if piece.num_blocks * MAX_PADDING < longest), size)
        yield sorted(rest[:size], key=lambda piece: piece.token)
        rest = rest[size:]


def _group(batch: AttentionBatch, pieces: list[Piece], shape: Shape) -> Group:
    size, query_len = batch.block_size, pieces[0].query_len
    width = max(piece.num_blocks for piece in pieces)
    facts = torch.tensor([(p.row, p.token, p.position, p.first_block, p.num_blocks) for p in pieces])
    row, token, position, first, count = facts.unsqueeze(-1).unbind(1)
    column = torch.arange(width)
    blocks = batch.block_table[row, (first + column).clamp(max=batch.block_table.shape[1] - 1)].long()
    blocks = blocks.masked_fill(column >= count, 0)
    offset = torch.arange(query_len)
    query = (position + offset)[:, :, None]
    gathered = torch.arange(width * size)
    key = first * size + gathered
    seen = key[:, None] <= query
    if shape.window is not None:
        seen &= key[:, None] > query - shape.window
    owned = gathered < count * size
    stale = (key >= batch.seq_lens_host[row].long()) & owned
    return Group(
        num_rows=len(pieces),
        query_len=query_len,
        tokens=(token + offset).flatten(),
        blocks=blocks.flatten(),
        stale=stale.flatten().nonzero().flatten(),
        seen=(seen & owned[:, None]).repeat(1, shape.heads_per_kv, 1)[:, None],
        distance=(key[:, None] - query).float() if shape.needs_distance else None,
    )
