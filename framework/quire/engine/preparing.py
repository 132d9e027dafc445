"""Brings all that a step reads to the device, in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.contract.device import Device, GraphKey
from quire.contract.request import ScheduledRow
from quire.contract.sampling import SamplingBatch
from quire.engine.batch import BatchBuilder, StepInputs
from quire.engine.rows import RowTable
from quire.engine.staging import ALIGNMENT, Staging
from quire.sampling.pipeline import SamplingColumns, SamplingPipeline

DELTA_BYTES = 1 << 20
"""Room in a step's buffer for what changes: new blocks, tokens of new requests."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step, and how long a request may become."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int


@dataclass(frozen=True, slots=True)
class DrawRooms:
    """Where the parameters of steps that end at drawn tokens stand, for one size; their room has an `end`."""

    columns: SamplingColumns
    batch: SamplingBatch
    end: int


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a step that sample: slots, known tokens, and on the device their parameters."""

    slots: list[int]
    lengths: list[int]
    batch: SamplingBatch


class StepPreparer:
    """Inputs of one step after another.

    Args:
        device: where they go. sizes: of the largest step.
        pipeline: knows the rows' sampling parameters.

    Attributes:
        table: the rows. builder: of the inputs.
    """

    def __init__(self, device: Device, sizes: StepSizes, pipeline: SamplingPipeline) -> None:
        torch_device = device.torch_device()
        room = BatchBuilder.num_bytes(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        room += SamplingColumns.NUM_BYTES * sizes.max_num_seqs + 8 * ALIGNMENT
        room += DELTA_BYTES + 4 * sizes.max_model_len
        self.table = RowTable(sizes.max_num_seqs, sizes.max_model_len, sizes.block_size, torch_device)
        self._pipeline = pipeline
        self._staging = Staging(device, room)
        self._draws: dict[tuple[int, int], DrawRooms] = {}
        self.builder = BatchBuilder(self.table, self._staging, sizes.max_num_batched_tokens, sizes.block_size)

    def prepare(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> tuple[StepInputs, SampledRows | None]:
        """The inputs of these rows, padded to `key`; the schedule must have been applied to the table.

        There are no sampled rows where no row samples, or where the work takes the largest logits itself.
        """
        self._staging.begin()
        inputs, sampled = self.builder.stage(rows, key), None
        if key is None or key.ending != "greedy":
            sampled = self._stage_sampled([row for row in rows if row.samples], key)
        deltas = self.table.stage(self._staging)
        self._staging.send()
        self.table.flush(deltas)
        self.builder.load(inputs)
        return inputs, sampled

    def padding(self, key: GraphKey) -> StepInputs:
        """A step of that size without any rows."""
        self._staging.begin()
        inputs = self.builder.stage((), key)
        self._staging.send()
        self.builder.load(inputs)
        return inputs

    def _stage_sampled(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> SampledRows | None:
        if not rows:
            return None
        slots = [row.slot for row in rows]
        lengths = [row.num_computed_tokens + row.num_new_tokens for row in rows]
        if key is None or key.ending == "hidden":
            return SampledRows(slots, lengths, self._pipeline.columns(slots, lengths).batch(self._staging.put))
        rooms = self._draw_rooms(key.num_reqs)
        self._pipeline.fill(rooms.columns, slots, lengths)
        return SampledRows(slots, lengths, rooms.batch)

    def _draw_rooms(self, size: int) -> DrawRooms:
        """At the same addresses each time, for nothing but the inputs of such a step stands before them."""
        place = (self._staging.turn, size)
        known = self._draws.get(place)
        if known is not None:
            self._staging.take(known.end)
            return known
        dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
        vectors = [self._staging.reserve(size, dtype) for dtype in dtypes]
        columns = SamplingColumns(*(room.array for room in vectors))
        temperature, top_k, top_p, min_p, seeds, positions = (room.device for room in vectors)
        # Flags that hold for all rows that may come.
        batch = SamplingBatch(temperature, top_k, top_p, min_p, seeds, positions, False, True, True, True)
        rooms = self._draws[place] = DrawRooms(columns, batch, self._staging.used)
        return rooms
