"""Builds a step's inputs from the schedule and the rows: vectorised, into buffers that are reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.contract.attention import AttentionBatch
from quire.contract.device import Device, GraphKey
from quire.contract.kv import NULL_BLOCK
from quire.contract.request import ScheduledRow
from quire.engine.rows import RowTable


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


class _Buffer:
    """A host tensor with its device twin; on a CPU device they are one."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.host = device.host_buffer(shape, dtype)
        target = device.torch_device()
        self.device = self.host if target.type == "cpu" else torch.zeros(*shape, dtype=dtype, device=target)
        self.array: NDArray[np.int64] = self.host.numpy()

    def send(self, length: int) -> Tensor:
        """The first `length` entries on the device."""
        if self.device is not self.host:
            self.device[:length].copy_(self.host[:length], non_blocking=True)
        return self.device[:length]


class BatchBuilder:
    """Turns scheduled rows into `StepInputs`.

    Args:
        rows: the persistent rows; the schedule must have been applied to them.
        device: where the inputs go.
        max_num_tokens: largest step.
        block_size: slots per KV block.
    """

    def __init__(self, rows: RowTable, device: Device, max_num_tokens: int, block_size: int) -> None:
        max_num_seqs = rows.block_table.shape[0]
        self._rows = rows
        self._block_size = block_size
        self._width = rows.token_ids.shape[1]
        self._offsets = np.arange(max_num_tokens, dtype=np.int64)
        self._query_start_loc = _Buffer(device, (max_num_seqs + 1,), torch.int32)
        self._seq_lens = _Buffer(device, (max_num_seqs,), torch.int32)
        self._block_table = _Buffer(device, (max_num_seqs, rows.max_blocks), torch.int32)
        self._slot_mapping = _Buffer(device, (max_num_tokens,), torch.int64)
        self._positions = _Buffer(device, (max_num_tokens,), torch.int64)
        self._token_index = _Buffer(device, (max_num_tokens,), torch.int64)
        self._sample_rows = _Buffer(device, (max_num_seqs,), torch.int64)

    def build(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> StepInputs:
        """Inputs for these rows, padded to `key`, or exact without one. Valid until the next call."""
        num_reqs, slots, computed, new = self._columns(rows)
        num_tokens = int(new.sum())
        padded_reqs, padded_tokens = (key.num_reqs, key.num_tokens) if key else (num_reqs, num_tokens)
        starts = self._fill_lengths(num_reqs, padded_reqs, computed, new)
        self._fill_tokens(num_tokens, padded_tokens, slots, computed, new, starts)
        samples = np.flatnonzero([row.samples for row in rows])
        self._sample_rows.array[: len(samples)] = starts[1:][samples] - 1
        attention = self._attention(num_reqs, padded_reqs, padded_tokens, slots, new, key)
        token_index = self._token_index.send(padded_tokens)
        return StepInputs(
            input_ids=self._rows.token_ids.view(-1)[token_index].long(),
            positions=self._positions.send(padded_tokens),
            attention=attention,
            sample_rows=self._sample_rows.send(len(samples)),
            num_tokens=num_tokens,
        )

    @staticmethod
    def _columns(
        rows: Sequence[ScheduledRow],
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        table = np.array([(row.slot, row.num_computed_tokens, row.num_new_tokens) for row in rows], dtype=np.int64)
        slots, computed, new = table.reshape(-1, 3).T
        return len(rows), slots, computed, new

    def _fill_lengths(
        self, num_reqs: int, padded_reqs: int, computed: NDArray[np.int64], new: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        starts = np.zeros(num_reqs + 1, dtype=np.int64)
        np.cumsum(new, out=starts[1:])
        self._query_start_loc.array[: num_reqs + 1] = starts
        self._query_start_loc.array[num_reqs + 1 : padded_reqs + 1] = starts[-1]
        self._seq_lens.array[:num_reqs] = computed + new
        self._seq_lens.array[num_reqs:padded_reqs] = 0
        return starts

    def _fill_tokens(
        self,
        num_tokens: int,
        padded_tokens: int,
        slots: NDArray[np.int64],
        computed: NDArray[np.int64],
        new: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> None:
        positions = self._offsets[:num_tokens] - np.repeat(starts[:-1] - computed, new)
        slot_of_token = np.repeat(slots, new)
        blocks = self._rows.block_table[slot_of_token, positions // self._block_size].astype(np.int64)
        self._positions.array[:num_tokens] = positions
        self._token_index.array[:num_tokens] = slot_of_token * self._width + positions
        self._slot_mapping.array[:num_tokens] = blocks * self._block_size + positions % self._block_size
        padding = self._offsets[: padded_tokens - num_tokens]
        self._positions.array[num_tokens:padded_tokens] = 0
        self._token_index.array[num_tokens:padded_tokens] = 0
        null_slot = NULL_BLOCK * self._block_size
        self._slot_mapping.array[num_tokens:padded_tokens] = null_slot + padding % self._block_size

    def _attention(
        self,
        num_reqs: int,
        padded_reqs: int,
        padded_tokens: int,
        slots: NDArray[np.int64],
        new: NDArray[np.int64],
        key: GraphKey | None,
    ) -> AttentionBatch:
        max_query_len = int(new.max())
        max_seq_len = int(self._seq_lens.array[:num_reqs].max())
        # A graph's addresses and shapes may not change, so its table has full width.
        width = self._rows.max_blocks if key else -(-max_seq_len // self._block_size)
        self._block_table.array[:num_reqs, :width] = self._rows.block_table[slots, :width]
        self._block_table.array[num_reqs:padded_reqs, :width] = NULL_BLOCK
        return AttentionBatch(
            num_reqs=padded_reqs,
            num_tokens=padded_tokens,
            uniform_query_len=max_query_len if int(new.min()) == max_query_len else 0,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_size=self._block_size,
            query_start_loc=self._query_start_loc.send(padded_reqs + 1),
            seq_lens=self._seq_lens.send(padded_reqs),
            block_table=self._block_table.send(padded_reqs)[:, :width],
            slot_mapping=self._slot_mapping.send(padded_tokens),
            query_start_loc_host=self._query_start_loc.host[: padded_reqs + 1],
            seq_lens_host=self._seq_lens.host[:padded_reqs],
        )
