"""Paged attention in plain torch. The oracle for other backends, and fast enough to be a default.

Each step the rows are sorted into groups that one call can serve: decode rows of similar length
share a padded gather of their KV, a row with several query tokens stands alone. Everything that
does not depend on the layer's tensors (slots, masks) is made once per step, in `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from quire.plugin import (
    AttentionBackend,
    AttentionBatch,
    AttentionCaps,
    AttentionInit,
    AttentionLayer,
    KVCaches,
)
from torch import Tensor
from torch.nn import functional

from quire_cpu_ref.tiles import TilePlan, plan_tiles, run_tiles

MAX_PADDING = 1.5
"""A group's longest row may be this many times its shortest, so that padding stays under a third."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that one call serves: B of them, with q query tokens each, over N padded KV positions.

    Attributes:
        tokens: int64 [B·q]; their places in the step's T tokens.
        blocks: int64 [B·(N / block_size)]; the KV blocks, row after row.
        query_len: q.
        positions: int64 [B, q]; positions of the query tokens.
        lengths: int64 [B]; valid KV positions.
        stale: int64; places among the B·N gathered positions that hold another request's leavings.
        is_ragged: whether any row is shorter than N, or the queries need a causal mask.
    """

    tokens: Tensor
    blocks: Tensor
    query_len: int
    positions: Tensor
    lengths: Tensor
    stale: Tensor
    is_ragged: bool


class StepPlan:
    """A step's groups, and their masks, which layers of the same window share."""

    def __init__(self, groups: tuple[Group, ...], block_size: int) -> None:
        self.groups = groups
        self._block_size = block_size
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """bool [B, 1, q, N], True where a query sees a position; None: it sees all of them."""
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = _mask(self.groups[index], window, self._block_size)
        return self._masks[key]


class CpuRefAttention(AttentionBackend):
    """See the module's docstring. Scores and softmax are computed in float32 for every dtype."""

    caps = AttentionCaps(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        features=frozenset({"causal", "sliding_window", "logit_softcap", "sinks", "v_head_dim"}),
        deterministic=True,
        needs_exact_host_lens=True,
    )

    def __init__(self, init: AttentionInit) -> None:
        super().__init__(init)
        self._plan = self._plan_tiles if init.deterministic else self._plan_groups

    def plan(self, batch: AttentionBatch) -> StepPlan | TilePlan:
        return self._plan(batch)

    def _plan_groups(self, batch: AttentionBatch) -> StepPlan:
        return StepPlan(tuple(_groups(batch)), batch.block_size)

    def _plan_tiles(self, batch: AttentionBatch) -> TilePlan:
        return plan_tiles(batch)

    def forward(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        plan: StepPlan | TilePlan,
        out: Tensor,
    ) -> None:
        if isinstance(plan, TilePlan):
            run_tiles(layer, q, kv, plan, out)
            return
        covered = 0
        for index, group in enumerate(plan.groups):
            result = _attend(layer, q, kv, group, plan.mask(index, layer.sliding_window))
            out.index_copy_(0, group.tokens, result)
            covered += group.tokens.numel()
        if covered < out.shape[0]:
            out[int(batch.query_start_loc_host[-1]) :].zero_()  # padding tokens must stay finite


def _groups(batch: AttentionBatch) -> Iterator[Group]:
    starts = batch.query_start_loc_host.tolist()
    lengths = batch.seq_lens_host.tolist()
    rows = [(lengths[i], starts[i + 1] - starts[i], i) for i in range(batch.num_reqs) if starts[i + 1] > starts[i]]
    single = sorted((row for row in rows if row[1] == 1), reverse=True)
    while single:
        longest = single[0][0]
        size = next((i for i, row in enumerate(single) if row[0] * MAX_PADDING < longest), len(single))
        yield _group(batch, [row[2] for row in single[:size]], 1, longest, starts)
        single = single[size:]
    for length, query_len, row in rows:
        if query_len > 1:
            yield _group(batch, [row], query_len, length, starts)


def _group(batch: AttentionBatch, rows: list[int], query_len: int, longest: int, starts: list[int]) -> Group:
    size = batch.block_size
    index = torch.tensor(rows)
    num_blocks = -(-longest // size)
    lengths = batch.seq_lens_host[index].long()
    first = torch.tensor([starts[row] for row in rows])
    offsets = torch.arange(query_len)
    return Group(
        tokens=(first[:, None] + offsets).flatten(),
        blocks=batch.block_table[index, :num_blocks].flatten().long(),
        query_len=query_len,
        positions=lengths[:, None] - query_len + offsets,
        lengths=lengths,
        stale=_stale(lengths, num_blocks * size, size),
        is_ragged=query_len > 1 or bool((lengths < num_blocks * size).any()),
    )


def _stale(lengths: Tensor, width: int, block_size: int) -> Tensor:
    """Places behind each row's end in its last block. Beyond that block stands the null block, which is zero."""
    position = torch.arange(width)
    end = (lengths + block_size - 1) // block_size * block_size
    return ((position >= lengths[:, None]) & (position < end[:, None])).flatten().nonzero().flatten()


def _mask(group: Group, window: int | None, block_size: int) -> Tensor | None:
    width = group.blocks.numel() // group.lengths.numel() * block_size
    if not group.is_ragged and (window is None or window >= width):
        return None
    key = torch.arange(width)
    query = group.positions[:, :, None]
    seen = key <= query  # also hides the padding behind each row's end
    if window is not None:
        seen = seen & (key > query - window)
    return seen[:, None]


def _attend(layer: AttentionLayer, q: Tensor, kv: KVCaches, group: Group, mask: Tensor | None) -> Tensor:
    """Attention of one group: [B·q, Hq, Dv]."""
    num_rows = group.lengths.numel()
    keys, values = (_gather(cache, group) for cache in kv)
    queries = q[group.tokens].view(num_rows, group.query_len, layer.num_heads, layer.head_dim).transpose(1, 2)
    if layer.logit_softcap is None and layer.sinks is None:
        result = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=layer.scale, enable_gqa=layer.num_heads != layer.num_kv_heads
        )
    else:
        result = attend_explicitly(layer, queries, keys, values, mask)
    return result.transpose(1, 2).reshape(-1, layer.num_heads, layer.v_head_dim)


def _gather(cache: Tensor, group: Group) -> Tensor:
    """The rows' KV as [B, Hkv, N, D], with zeros in stale places: a mask cannot hide a NaN."""
    found = cache.index_select(0, group.blocks).flatten(0, 1)
    if group.stale.numel():
        found.index_fill_(0, group.stale, 0.0)
    return found.view(group.lengths.numel(), -1, *cache.shape[2:]).transpose(1, 2)


def attend_explicitly(
    layer: AttentionLayer, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention spelled out, with softcap and sinks: queries [B, Hq, q, D], keys, values [B, Hkv, N, D]."""
    batch, heads, query_len, _ = queries.shape
    group = heads // layer.num_kv_heads
    folded = queries.reshape(batch, layer.num_kv_heads, group * query_len, -1).float()
    scores = torch.matmul(folded, keys.float().transpose(-1, -2)) * layer.scale
    scores = scores.view(batch, heads, query_len, -1)
    if layer.logit_softcap is not None:
        scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if layer.sinks is not None:
        # A sink is one more position that takes probability and gives no value.
        sink = layer.sinks.float().view(1, heads, 1, 1).expand(batch, heads, query_len, 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    folded_weights = weights.reshape(batch, layer.num_kv_heads, group * query_len, -1)
    result = torch.matmul(folded_weights, values.float())
    return result.view(batch, heads, query_len, layer.v_head_dim).to(queries.dtype)
