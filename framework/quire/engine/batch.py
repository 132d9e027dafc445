"""Builds a step's inputs from the schedule and the rows: vectorised, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.contract.attention import AttentionBatch
from quire.contract.device import GraphKey
from quire.contract.kv import NULL_BLOCK
from quire.contract.request import ScheduledRow
from quire.engine.rows import RowTable
from quire.engine.staging import Reserved, Staging

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that one forward pass reads.

    Attributes:
        input_ids: int64 [T], device. positions: int64 [T], device.
        attention: the rows for the attention backend.
        sample_rows: int64 [S], device; index into the T tokens of each row that samples.
        num_tokens: tokens before padding.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    sample_rows: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """Inputs on their way to the device, and what the host knows of them. `key`: what they are padded to, if anything.

    `uniform_query_len`, `max_query_len`, `max_seq_len`, `num_reqs`, `num_tokens` as in `AttentionBatch`.
    """

    key: GraphKey | None
    num_reqs: int
    num_tokens: int
    num_real_tokens: int
    uniform_query_len: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Reserved
    seq_lens: Reserved
    slot_mapping: Tensor
    positions: Tensor
    token_index: Tensor
    slots: Tensor
    sample_rows: Tensor


class BatchBuilder:
    """Turns scheduled rows into `StepInputs`: `stage`, then the staging's `send`, then `inputs`.

    Args:
        rows: the persistent rows; the schedule must have been applied to them.
        staging: the step's buffer.
        max_num_tokens: largest step.
        block_size: slots per KV block.
    """

    def __init__(self, rows: RowTable, staging: Staging, max_num_tokens: int, block_size: int) -> None:
        max_num_seqs, device = rows.token_ids.shape[0], rows.token_ids.device
        self._rows = rows
        self._staging = staging
        self._block_size = block_size
        self._width = rows.token_ids.shape[1]
        self._offsets = np.arange(max_num_tokens, dtype=np.int64)
        # A graph reads its inputs at the same addresses every time.
        self._input_ids = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(max_num_seqs, rows.max_blocks, dtype=torch.int32, device=device)

    @staticmethod
    def num_bytes(max_num_seqs: int, max_num_tokens: int) -> int:
        """Bytes of the largest step in the staging's buffer."""
        return 24 * max_num_tokens + 24 * max_num_seqs + 1024

    def stage(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> StagedBatch:
        """Fill the step's buffer, padded to `key`, or exact without one. To be called first after `begin`.

        No rows at all make a step of padding only.
        """
        slots, computed, new, samples = _columns(rows)
        num_reqs, num_tokens = len(rows), int(new.sum())
        padded_reqs, padded_tokens = (key.num_reqs, key.num_tokens) if key else (num_reqs, num_tokens)
        starts, query_start_loc, seq_lens = self._stage_lengths(padded_reqs, computed, new)
        positions, token_index, slot_mapping = self._stage_tokens(padded_tokens, slots, computed, new, starts)
        slot_room = self._staging.reserve(padded_reqs, torch.int64)
        slot_room.array[:num_reqs] = slots
        slot_room.array[num_reqs:] = self._rows.padding_slot
        lengths = [row.num_new_tokens for row in rows]
        longest = max(lengths, default=0)
        return StagedBatch(
            key=key,
            num_reqs=padded_reqs,
            num_tokens=padded_tokens,
            num_real_tokens=num_tokens,
            # A graph's scalars must not change either: bounds that hold for every step of its size.
            uniform_query_len=key.uniform_query_len if key else longest * (min(lengths, default=0) == longest),
            max_query_len=(key.uniform_query_len or key.num_tokens) if key else longest,
            max_seq_len=self._rows.max_blocks * self._block_size if key else int((computed + new).max(initial=0)),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            slot_mapping=slot_mapping,
            positions=positions,
            token_index=token_index,
            slots=slot_room.device,
            sample_rows=self._staging.put(starts[1:][samples != 0] - 1),
        )

    def inputs(self, staged: StagedBatch) -> StepInputs:
        """The inputs on the device, once the buffer has been sent and the rows' changes flushed."""
        input_ids, block_table = self._gathered(staged)
        return StepInputs(
            input_ids=input_ids,
            positions=staged.positions,
            attention=AttentionBatch(
                num_reqs=staged.num_reqs,
                num_tokens=staged.num_tokens,
                uniform_query_len=staged.uniform_query_len,
                max_query_len=staged.max_query_len,
                max_seq_len=staged.max_seq_len,
                block_size=self._block_size,
                query_start_loc=staged.query_start_loc.device,
                seq_lens=staged.seq_lens.device,
                block_table=block_table,
                slot_mapping=staged.slot_mapping,
                query_start_loc_host=staged.query_start_loc.host,
                seq_lens_host=staged.seq_lens.host,
            ),
            sample_rows=staged.sample_rows,
            num_tokens=staged.num_real_tokens,
        )

    def _gathered(self, staged: StagedBatch) -> tuple[Tensor, Tensor]:
        """Token ids and block tables, from where they live on the device."""
        tokens = self._rows.token_ids.view(-1).index_select(0, staged.token_index)
        if staged.key is None:
            width = -(-staged.max_seq_len // self._block_size)
            return tokens.long(), self._rows.block_table[:, :width].index_select(0, staged.slots)
        input_ids, block_table = self._input_ids[: staged.num_tokens], self._block_table[: staged.num_reqs]
        input_ids.copy_(tokens)
        torch.index_select(self._rows.block_table, 0, staged.slots, out=block_table)
        return input_ids, block_table

    def _stage_lengths(
        self, padded_reqs: int, computed: IntArray, new: IntArray
    ) -> tuple[IntArray, Reserved, Reserved]:
        num_reqs = len(new)
        starts = np.zeros(num_reqs + 1, dtype=np.int64)
        np.cumsum(new, out=starts[1:])
        query_start_loc = self._staging.reserve(padded_reqs + 1, torch.int32)
        query_start_loc.array[: num_reqs + 1] = starts
        query_start_loc.array[num_reqs + 1 :] = starts[-1]
        seq_lens = self._staging.reserve(padded_reqs, torch.int32)
        seq_lens.array[:num_reqs] = computed + new
        seq_lens.array[num_reqs:] = 0
        return starts, query_start_loc, seq_lens

    def _stage_tokens(
        self, padded_tokens: int, slots: IntArray, computed: IntArray, new: IntArray, starts: IntArray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Position, place in the table of tokens, and slot of the cache of each token."""
        num_tokens = int(starts[-1])
        rooms = [self._staging.reserve(padded_tokens, torch.int64) for _ in range(3)]
        position, index, cache_slot = (room.array for room in rooms)
        positions = self._offsets[:num_tokens] - np.repeat(starts[:-1] - computed, new)
        slot_of_token = np.repeat(slots, new)
        blocks = self._rows.host_block_table[slot_of_token, positions // self._block_size].astype(np.int64)
        position[:num_tokens] = positions
        position[num_tokens:] = 0
        index[:num_tokens] = slot_of_token * self._width + positions
        index[num_tokens:] = 0
        cache_slot[:num_tokens] = blocks * self._block_size + positions % self._block_size
        null_slot, padding = NULL_BLOCK * self._block_size, self._offsets[: padded_tokens - num_tokens]
        cache_slot[num_tokens:] = null_slot + padding % self._block_size
        return rooms[0].device, rooms[1].device, rooms[2].device


def _columns(rows: Sequence[ScheduledRow]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Slots, computed and new tokens of the rows, and whether they sample."""
    table = [(row.slot, row.num_computed_tokens, row.num_new_tokens, row.samples) for row in rows]
    slots, computed, new, samples = np.array(table, dtype=np.int64).reshape(-1, 4).T
    return slots, computed, new, samples
