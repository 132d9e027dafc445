"""Makes `AttentionBatch`es for given lengths, with blocks scattered at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.contract.attention import AttentionBatch


@dataclass(frozen=True, slots=True)
class BatchCase:
    """A batch and what it was made from.

    Attributes:
        batch: the rows.
        tables: block table of each real row.
        num_blocks: blocks that a cache needs, the null block and some that nobody owns included.
    """

    batch: AttentionBatch
    tables: tuple[tuple[int, ...], ...]
    num_blocks: int

    def slots(self, row: int, count: int) -> torch.Tensor:
        """int64 [count]; the slots of the row's first positions."""
        size = self.batch.block_size
        return torch.tensor([self.tables[row][p // size] * size + p % size for p in range(count)], dtype=torch.int64)


def make_batch(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    block_size: int = 16,
    pad_reqs: int = 0,
    pad_tokens: int = 0,
    seed: int = 0,
    unowned: int = 3,
    device: torch.device | str = "cpu",
) -> BatchCase:
    """A batch whose row i has `query_lens[i]` new tokens behind `context_lens[i]` cached ones."""
    seq_lens = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    counts = [-(-length // block_size) for length in seq_lens]
    blocks = list(range(1, sum(counts) + unowned + 1))
    random.Random(seed).shuffle(blocks)
    tables = tuple(tuple(blocks.pop() for _ in range(count)) for count in counts)
    num_reqs, num_tokens = len(seq_lens) + pad_reqs, sum(query_lens) + pad_tokens
    table = torch.zeros(num_reqs, max(counts, default=0) + 1, dtype=torch.int32)
    for row, owned in enumerate(tables):
        table[row, : len(owned)] = torch.tensor(owned, dtype=torch.int32)
    slots = [
        tables[row][position // block_size] * block_size + position % block_size
        for row, (length, query_len) in enumerate(zip(seq_lens, query_lens, strict=True))
        for position in range(length - query_len, length)
    ]
    slots += [index % block_size for index in range(pad_tokens)]
    ends = torch.tensor([0, *query_lens, *[0] * pad_reqs]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([*seq_lens, *[0] * pad_reqs], dtype=torch.int32)
    batch = AttentionBatch(
        num_reqs=num_reqs,
        num_tokens=num_tokens,
        uniform_query_len=query_lens[0] if len(set(query_lens)) == 1 else 0,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_size=block_size,
        query_start_loc=ends.to(device),
        seq_lens=lengths.to(device),
        block_table=table.to(device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        query_start_loc_host=ends,
        seq_lens_host=lengths,
    )
    return BatchCase(batch, tables, sum(counts) + unowned + 1)
