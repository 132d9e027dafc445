"""The runner's persistent rows: one per slot, kept between steps, changed by small deltas.

Token ids live on the device, where the sampler's answers are stored as they are made, so that the
next step's inputs never wait for the host. Block tables and lengths live on the host: they are
known when a step is scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.contract.request import NewRow, Schedule
from quire.params import SamplingParams


@dataclass(slots=True)
class Row:
    """What the runner remembers of the request in a slot."""

    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    num_blocks: int = 0


class RowTable:
    """Rows for `max_num_seqs` slots.

    Attributes:
        token_ids: int32 [max_num_seqs, max_model_len + 1], device; known tokens of each slot's request.
        block_table: int32 [max_num_seqs, max_blocks], host; unused entries are 0.
        rows: slot -> what is remembered of its request.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        # One column more than the longest request, so that storing the very last token needs no test.
        self.token_ids = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device)
        self.max_blocks = -(-max_model_len // block_size)
        self.block_table = np.zeros((max_num_seqs, self.max_blocks), dtype=np.int32)
        self.rows: dict[int, Row] = {}

    def apply(self, schedule: Schedule) -> None:
        """Release and take slots, and append the blocks that the schedule granted."""
        for slot in schedule.released:
            del self.rows[slot]
            self.block_table[slot] = 0
        for new in schedule.new_rows:
            self._take(new)
        for row in schedule.rows:
            if row.new_block_ids:
                self._append_blocks(row.slot, row.new_block_ids)

    def store(self, slots: Tensor, columns: Tensor, token_ids: Tensor) -> None:
        """Record sampled tokens: token_ids [R] of rows `slots` at positions `columns`, all on the device."""
        self.token_ids[slots, columns] = token_ids.to(torch.int32)

    def _take(self, new: NewRow) -> None:
        if new.slot in self.rows:
            raise AssertionError(f"slot {new.slot} is taken by {self.rows[new.slot].request_id!r}")
        self.rows[new.slot] = Row(new.request_id, new.params, new.num_prompt_tokens)
        self.token_ids[new.slot, : len(new.token_ids)] = torch.tensor(new.token_ids, dtype=torch.int32)

    def _append_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        row = self.rows[slot]
        end = row.num_blocks + len(block_ids)
        self.block_table[slot, row.num_blocks : end] = block_ids
        row.num_blocks = end
