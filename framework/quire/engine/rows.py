"""The runner's persistent rows: one per slot, kept between steps, changed by small deltas.

Token ids and block tables live on the device. The sampler's answers are stored there as they are made, so
that the next step's inputs never wait for the host; a new request's tokens, and new blocks, travel with the
step that first needs them. The host keeps block tables as well, for it computes where tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.contract.request import NewRow, Schedule
from quire.engine.staging import Staging


@dataclass(slots=True)
class Row:
    """What the runner remembers of the request in a slot. `new`: as it came, without its tokens."""

    new: NewRow
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class RowDeltas:
    """Changes on their way to the device: slots to clear, (places, blocks) to append, tokens of new requests."""

    cleared: Tensor | None
    blocks: tuple[Tensor, Tensor] | None
    tokens: tuple[tuple[int, Tensor], ...]


class RowTable:
    """Rows for `max_num_seqs` slots.

    Attributes:
        token_ids: int32 [max_num_seqs, max_model_len + 1], device; known tokens of each slot's request.
        block_table: int32 [max_num_seqs + 1, max_blocks], device; unused entries are 0, as is the last row,
            which stands for padding.
        host_block_table: the same on the host, ahead of the device until the deltas have been flushed.
        rows: slot -> what is remembered of its request.
        version: counts the changes of `block_table`.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        # One column more than the longest request, so that storing the very last token needs no test.
        self.token_ids = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device)
        self.max_blocks = -(-max_model_len // block_size)
        self.block_table = torch.zeros(max_num_seqs + 1, self.max_blocks, dtype=torch.int32, device=device)
        self.host_block_table = np.zeros((max_num_seqs + 1, self.max_blocks), dtype=np.int32)
        self.rows: dict[int, Row] = {}
        self.version = 0
        self._cleared: list[int] = []
        self._new_rows: list[NewRow] = []
        self._appended: list[tuple[int, int, tuple[int, ...]]] = []

    @property
    def padding_slot(self) -> int:
        """The row of the block table that stands for padding."""
        return self.token_ids.shape[0]

    @property
    def spare_place(self) -> int:
        """A place of the flattened `token_ids` for what padding samples: nobody reads behind the longest request."""
        return self.token_ids.shape[1] - 1

    def apply(self, schedule: Schedule) -> None:
        """Release and take slots, and append the blocks that the schedule granted; the device learns of it later."""
        for slot in schedule.released:
            self._release(slot)
        for new in schedule.new_rows:
            self._take(new)
        for row in schedule.rows:
            if row.new_block_ids:
                self._append_blocks(row.slot, row.new_block_ids)

    def stage(self, staging: Staging) -> RowDeltas:
        """Put what the device has yet to learn into the step's buffer."""
        deltas = RowDeltas(
            cleared=staging.put(np.array(self._cleared, dtype=np.int64)) if self._cleared else None,
            blocks=self._stage_blocks(staging) if self._appended else None,
            tokens=tuple((new.slot, staging.put(np.array(new.token_ids, dtype=np.int32))) for new in self._new_rows),
        )
        self._cleared.clear()
        self._new_rows.clear()
        self._appended.clear()
        return deltas

    def flush(self, deltas: RowDeltas) -> None:
        """Apply staged changes on the device, once the step's buffer has been sent."""
        self.version += deltas.cleared is not None or deltas.blocks is not None
        if deltas.cleared is not None:
            self.block_table.index_fill_(0, deltas.cleared, 0)
        if deltas.blocks is not None:
            self.block_table.view(-1).index_copy_(0, *deltas.blocks)
        for slot, tokens in deltas.tokens:
            self.token_ids[slot, : len(tokens)] = tokens

    def store(self, places: Tensor, token_ids: Tensor) -> None:
        """Record sampled tokens int32 [R] at the first R of `places`, int64, of the flattened `token_ids`."""
        if len(places) != len(token_ids):
            places = places[: len(token_ids)]
        self.token_ids.view(-1).index_copy_(0, places, token_ids)

    def _stage_blocks(self, staging: Staging) -> tuple[Tensor, Tensor]:
        starts = [(slot * self.max_blocks + first, granted) for slot, first, granted in self._appended]
        places = [start + at for start, granted in starts for at in range(len(granted))]
        blocks = [block for _, granted in starts for block in granted]
        return staging.put(np.array(places, dtype=np.int64)), staging.put(np.array(blocks, dtype=np.int32))

    def _take(self, new: NewRow) -> None:
        if new.slot in self.rows:
            raise AssertionError(f"slot {new.slot} is taken by {self.rows[new.slot].new.request_id!r}")
        self.rows[new.slot] = Row(replace(new, token_ids=()))
        self._new_rows.append(new)

    def _release(self, slot: int) -> None:
        del self.rows[slot]
        self.host_block_table[slot] = 0
        self._cleared.append(slot)
        # What a failed step has left unsent must not come behind the clearing.
        self._new_rows = [new for new in self._new_rows if new.slot != slot]
        self._appended = [item for item in self._appended if item[0] != slot]

    def _append_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        row = self.rows[slot]
        end = row.num_blocks + len(block_ids)
        self.host_block_table[slot, row.num_blocks : end] = block_ids
        self._appended.append((slot, row.num_blocks, block_ids))
        row.num_blocks = end
