"""Builds a step's inputs from the schedule and the rows: vectorised, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
FEW = 64
"""Rows of decode steps up to which a loop over them is no slower than whole vectors, and less to fetch into caches."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a step's work reads. Their content comes with the staging's `send` and the builder's `load` and `read`.

    Attributes:
        input_ids: int64 [T], device. positions: int64 [T], device.
        attention: the rows for the attention backend.
        sample_rows: int64 [S], device; index into the T tokens of each row that samples.
        places: int64 [num_reqs], device; where sampled tokens go in the flattened table of tokens, the first S of them.
        token_index: int64 [T], device; where the tokens are in it. slots: int64 [num_reqs], device.
        num_tokens: tokens before padding.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    sample_rows: Tensor
    places: Tensor
    token_index: Tensor
    slots: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeRooms:
    """Where the inputs of decode steps of one size stand, each time anew; their room in the buffer has an `end`."""

    inputs: StepInputs
    end: int
    query_start_loc: NDArray[Any]
    seq_lens: NDArray[Any]
    positions: NDArray[Any]
    token_index: NDArray[Any]
    slot_mapping: NDArray[Any]
    slots: NDArray[Any]
    places: NDArray[Any]
    sample_rows: NDArray[Any]


class BatchBuilder:
    """Turns scheduled rows into `StepInputs`: `stage`, the staging's `send`, `load`; the step's work begins by `read`.

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
        self._offsets = np.arange(max_num_tokens + 1, dtype=np.int64)
        # A graph reads its inputs at the same addresses every time.
        self._input_ids = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(max_num_seqs, rows.max_blocks, dtype=torch.int32, device=device)
        self._decodes: dict[tuple[GraphKey, int, int], DecodeRooms] = {}
        # Slots of a decode step: of the one being staged, and with the version, of the tables that stand there.
        self._decoded: bytes | None = None
        self._loaded: tuple[int, bytes] | None = None

    @staticmethod
    def num_bytes(max_num_seqs: int, max_num_tokens: int) -> int:
        """Bytes of the largest step in the staging's buffer."""
        return 24 * max_num_tokens + 32 * max_num_seqs + 1024

    def stage(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> StepInputs:
        """Fill the step's buffer, padded to `key`, or exact without one. To be called first after `begin`.

        No rows at all make a step of padding only.
        """
        if key is not None and _is_short_decode(rows, key):
            return self._stage_decode(rows, key)
        self._decoded = None
        slots, computed, new, samples = _columns(rows)
        num_reqs, num_tokens = len(rows), int(new.sum())
        padded_reqs, padded_tokens = (key.num_reqs, key.num_tokens) if key else (num_reqs, num_tokens)
        starts, query_start_loc, seq_lens = self._stage_lengths(padded_reqs, computed, new)
        positions, token_index, slot_mapping = self._stage_tokens(padded_tokens, slots, computed, new, starts)
        slot_room = self._staging.reserve(padded_reqs, torch.int64)
        slot_room.array[:num_reqs] = slots
        slot_room.array[num_reqs:] = self._rows.padding_slot
        # Room for each row, whether it samples or not: what stands behind must not move.
        places, sample_rows = (self._staging.reserve(padded_reqs, torch.int64) for _ in range(2))
        chosen = samples != 0
        num_sampled = int(chosen.sum())
        places.array[:num_sampled] = (slots * self._width + computed + new)[chosen]
        places.array[num_sampled:] = self._rows.spare_place
        sample_rows.array[:num_sampled] = starts[1:][chosen] - 1
        lengths = [row.num_new_tokens for row in rows]
        longest, known = max(lengths, default=0), int((computed + new).max(initial=0))
        attention = AttentionBatch(
            num_reqs=padded_reqs,
            num_tokens=padded_tokens,
            # A graph's scalars must not change either: bounds that hold for every step of its size.
            uniform_query_len=key.uniform_query_len if key else longest * (min(lengths, default=0) == longest),
            max_query_len=(key.uniform_query_len or key.num_tokens) if key else longest,
            max_seq_len=self._rows.max_blocks * self._block_size if key else known,
            block_size=self._block_size,
            query_start_loc=query_start_loc.device,
            seq_lens=seq_lens.device,
            block_table=self._room_for_table(padded_reqs, None if key else known),
            slot_mapping=slot_mapping,
            query_start_loc_host=query_start_loc.host,
            seq_lens_host=seq_lens.host,
        )
        return StepInputs(
            input_ids=self._input_ids[:padded_tokens],
            positions=positions,
            attention=attention,
            sample_rows=sample_rows.device[:num_sampled],
            places=places.device,
            token_index=token_index,
            slots=slot_room.device,
            num_tokens=num_tokens,
        )

    def load(self, inputs: StepInputs) -> None:
        """Gather the block tables, once the buffer has been sent and the rows' changes flushed.

        Decode steps often need those that the one before them has left.
        """
        wanted = None if self._decoded is None else (self._rows.version, self._decoded)
        if wanted is None or wanted != self._loaded:
            table = inputs.attention.block_table
            torch.index_select(self._rows.block_table[:, : table.shape[1]], 0, inputs.slots, out=table)
            self._loaded = wanted

    def read(self, inputs: StepInputs) -> None:
        """Gather the tokens: the newest may have been sampled by the step before."""
        inputs.input_ids.copy_(self._rows.token_ids.view(-1).index_select(0, inputs.token_index))

    def _room_for_table(self, num_reqs: int, longest: int | None) -> Tensor:
        """For block tables as wide as the longest request needs; None: at a fixed address, as wide as any may be."""
        if longest is None:
            return self._block_table[:num_reqs]
        return self._block_table.new_empty(num_reqs, -(-longest // self._block_size))

    def _stage_decode(self, rows: Sequence[ScheduledRow], key: GraphKey) -> StepInputs:
        """`stage` of few rows of one token, all of which sample: most steps, so that little is done for them."""
        count, size, width = len(rows), self._block_size, self._width
        rooms, table = self._decode_rooms(key, count), self._rows.host_block_table
        rooms.query_start_loc[: count + 1] = self._offsets[: count + 1]
        rooms.sample_rows[:count] = self._offsets[:count]
        for at, row in enumerate(rows):
            slot, computed = row.slot, row.num_computed_tokens
            index = slot * width + computed
            block, offset = divmod(computed, size)
            rooms.slots[at], rooms.positions[at], rooms.seq_lens[at] = slot, computed, computed + 1
            rooms.token_index[at], rooms.places[at] = index, index + 1
            rooms.slot_mapping[at] = int(table[slot, block]) * size + offset
        if count < key.num_reqs:
            self._pad_decode(rooms, count)
        self._decoded = rooms.slots.tobytes()
        return rooms.inputs

    def _pad_decode(self, rooms: DecodeRooms, count: int) -> None:
        rooms.query_start_loc[count + 1 :] = count
        rooms.slots[count:] = self._rows.padding_slot
        for array in (rooms.positions, rooms.seq_lens, rooms.token_index):
            array[count:] = 0
        rooms.places[count:] = self._rows.spare_place
        rooms.slot_mapping[count:] = self._null_slots(len(rooms.slot_mapping) - count)

    def _decode_rooms(self, key: GraphKey, count: int) -> DecodeRooms:
        place = (key, self._staging.turn, count)
        known = self._decodes.get(place)
        if known is not None:
            self._staging.take(known.end)
            return known
        size = key.num_reqs
        lengths = [self._staging.reserve(length, torch.int32) for length in (size + 1, size)]
        vectors = [self._staging.reserve(size, torch.int64) for _ in range(6)]
        query_start_loc, seq_lens = lengths
        positions, token_index, slot_mapping, slots, places, sample_rows = (room.device for room in vectors)
        attention = AttentionBatch(
            num_reqs=size,
            num_tokens=size,
            uniform_query_len=1,
            max_query_len=1,
            max_seq_len=self._rows.max_blocks * self._block_size,
            block_size=self._block_size,
            query_start_loc=query_start_loc.device,
            seq_lens=seq_lens.device,
            block_table=self._room_for_table(size, None),
            slot_mapping=slot_mapping,
            query_start_loc_host=query_start_loc.host,
            seq_lens_host=seq_lens.host,
        )
        inputs = StepInputs(
            self._input_ids[:size], positions, attention, sample_rows[:count], places, token_index, slots, count
        )
        rooms = DecodeRooms(inputs, self._staging.used, *(room.array for room in (*lengths, *vectors)))
        self._decodes[place] = rooms
        return rooms

    def _null_slots(self, count: int) -> IntArray:
        """Slots of the null block, which padding tokens write to."""
        return NULL_BLOCK * self._block_size + self._offsets[:count] % self._block_size

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
        cache_slot[num_tokens:] = self._null_slots(padded_tokens - num_tokens)
        return rooms[0].device, rooms[1].device, rooms[2].device


def _is_short_decode(rows: Sequence[ScheduledRow], key: GraphKey) -> bool:
    return key.uniform_query_len == 1 and key.num_reqs <= FEW and all(row.samples for row in rows)


def _columns(rows: Sequence[ScheduledRow]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Slots, computed and new tokens of the rows, and whether they sample."""
    table = [(row.slot, row.num_computed_tokens, row.num_new_tokens, row.samples) for row in rows]
    slots, computed, new, samples = np.array(table, dtype=np.int64).reshape(-1, 4).T
    return slots, computed, new, samples
