"""The batch builder against a definition token by token; the dispatcher; a runner that pads."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from quire import SamplingParams
from quire.contract.attention import GraphSupport
from quire.contract.device import DeviceInit, GraphKey
from quire.contract.request import NewRow, Schedule, ScheduledRow
from quire.engine.batch import BatchBuilder
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.rows import RowTable
from quire.engine.staging import IN_FLIGHT, Staging
from quire.testing.delayed import DelayedDevice
from quire_cpu_ref.device import CpuDevice

SIZE, LENGTH, SEQS = 4, 40, 6


def random_rows(rng, table):
    """Some slots taken by requests, in random states; the rows of a step."""
    rows, new_rows, free_blocks = [], [], list(range(1, 200))
    rng.shuffle(free_blocks)
    for slot in rng.sample(range(SEQS), rng.randrange(1, SEQS + 1)):
        tokens = tuple(rng.randrange(500) for _ in range(rng.randrange(1, LENGTH)))
        computed = rng.randrange(len(tokens))
        count = rng.randrange(1, len(tokens) - computed + 1)
        blocks = tuple(free_blocks.pop() for _ in range(-(-(computed + count) // SIZE)))
        new_rows.append(NewRow(slot, f"r{slot}", tokens, 1, SamplingParams(), 0, frozenset()))
        rows.append(ScheduledRow(slot, f"r{slot}", computed, count, blocks, computed + count == len(tokens)))
    table.apply(Schedule(0, new_rows=tuple(new_rows), rows=tuple(rows)))
    return {row.slot: new.token_ids for row, new in zip(rows, new_rows, strict=True)}, rows


@pytest.mark.parametrize("padding", [None, (2, 9)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(15))
def test_batch_by_definition(seed, shared, padding):
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    tokens, rows = random_rows(random.Random(seed), table)
    device = CpuDevice if shared else DelayedDevice
    staging = Staging(device(DeviceInit()), 1 << 20)
    builder = BatchBuilder(table, staging, SEQS * LENGTH + 10, SIZE)
    total = sum(row.num_new_tokens for row in rows)
    key = None
    if padding is not None:
        key = GraphKey(0, min(SEQS, len(rows) + padding[0]), total + padding[1])
    staging.begin()
    inputs, deltas = builder.stage(rows, key), table.stage(staging)
    staging.send()
    table.flush(deltas)
    builder.load(inputs)
    builder.read(inputs)
    batch = inputs.attention
    assert (batch.num_reqs, batch.num_tokens) == ((key.num_reqs, key.num_tokens) if key else (len(rows), total))
    at = 0
    for index, row in enumerate(rows):
        end = row.num_computed_tokens + row.num_new_tokens
        assert batch.query_start_loc[index : index + 2].tolist() == [at, at + row.num_new_tokens]
        assert int(batch.seq_lens[index]) == end
        for position in range(row.num_computed_tokens, end):
            assert int(inputs.input_ids[at]) == tokens[row.slot][position]
            assert int(inputs.positions[at]) == position
            block = row.new_block_ids[position // SIZE]
            assert int(batch.slot_mapping[at]) == block * SIZE + position % SIZE
            assert int(batch.block_table[index, position // SIZE]) == block
            at += 1
    sampled = [int(batch.query_start_loc[i + 1]) - 1 for i, row in enumerate(rows) if row.samples]
    assert inputs.sample_rows.tolist() == sampled
    ends = [row.slot * (LENGTH + 1) + row.num_computed_tokens + row.num_new_tokens for row in rows if row.samples]
    assert inputs.places.tolist() == ends + [table.spare_place] * (batch.num_reqs - len(ends))
    assert batch.query_start_loc[len(rows) :].tolist() == [total] * (batch.num_reqs - len(rows) + 1)
    assert not batch.seq_lens[len(rows) :].any()
    assert all(slot < SIZE for slot in batch.slot_mapping[total:].tolist()), "padding must point into the null block"
    assert torch.equal(batch.seq_lens, batch.seq_lens_host)
    lengths = {row.num_new_tokens for row in rows}
    assert batch.uniform_query_len == (lengths.pop() if len(lengths) == 1 and key is None else 0)
    assert batch.max_query_len >= max(row.num_new_tokens for row in rows)
    assert batch.max_seq_len >= int(batch.seq_lens.max())


def random_decodes(rng, table):
    """Slots whose requests have computed all tokens but the newest, and those rows' next step, in any order."""
    rows, new_rows, free_blocks = [], [], list(range(1, 200))
    rng.shuffle(free_blocks)
    for slot in rng.sample(range(SEQS), rng.randrange(1, SEQS + 1)):
        tokens = tuple(rng.randrange(500) for _ in range(rng.randrange(1, LENGTH + 1)))
        blocks = tuple(free_blocks.pop() for _ in range(-(-len(tokens) // SIZE)))
        new_rows.append(NewRow(slot, f"r{slot}", tokens, 1, SamplingParams(), 0, frozenset()))
        rows.append(ScheduledRow(slot, f"r{slot}", len(tokens) - 1, 1, blocks, True))
    table.apply(Schedule(0, new_rows=tuple(new_rows), rows=tuple(rows)))
    return rows


@pytest.mark.parametrize("device", [CpuDevice, DelayedDevice])
@pytest.mark.parametrize("seed", range(20))
def test_decode_steps_are_staged_as_any_others_are(seed, device):
    """Against `stage` of the same rows without a key; twice, so that the rooms are known; padded or not."""
    rng = random.Random(seed)
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    rows = random_decodes(rng, table)
    staging = Staging(device(DeviceInit()), 1 << 20)
    builder, count = BatchBuilder(table, staging, SEQS * LENGTH, SIZE), len(rows)
    size = rng.randrange(count, SEQS + 1)
    for _ in range(5):
        rng.shuffle(rows)
        found = []
        for key in (None, GraphKey(1, size, size, rng.choice(("hidden", "greedy", "drawn")))):
            staging.begin()
            inputs, deltas = builder.stage(rows, key), table.stage(staging)
            behind = staging.put(np.full(3, 77, dtype=np.int64))
            staging.send()
            table.flush(deltas)
            builder.load(inputs)
            builder.read(inputs)
            batch = inputs.attention
            columns = (inputs.input_ids, inputs.positions, inputs.places, inputs.token_index, inputs.slots)
            columns += (batch.seq_lens, batch.seq_lens_host, batch.slot_mapping, inputs.sample_rows)
            found.append([column[:count].tolist() for column in columns])
            assert batch.query_start_loc[: count + 1].tolist() == list(range(count + 1))
            assert torch.equal(batch.query_start_loc, batch.query_start_loc_host)
            width = batch.max_seq_len // SIZE if key is None else table.max_blocks
            assert torch.equal(batch.block_table[:count, :width], table.block_table[inputs.slots[:count], :width])
            assert behind.tolist() == [77] * 3
        assert found[0] == found[1]
        assert (batch.num_reqs, batch.num_tokens, batch.uniform_query_len, inputs.num_tokens) == (size, size, 1, count)
        assert batch.query_start_loc[count:].tolist() == [count] * (size + 1 - count)
        assert not batch.seq_lens[count:].any()
        assert inputs.places[count:].tolist() == [table.spare_place] * (size - count)
        assert all(slot < SIZE for slot in batch.slot_mapping[count:].tolist())
        assert inputs.slots[count:].tolist() == [table.padding_slot] * (size - count)


@pytest.mark.parametrize("device", [CpuDevice, DelayedDevice])
@pytest.mark.parametrize("seed", range(10))
def test_decode_steps_that_follow_each_other_see_what_has_changed(seed, device):
    """Rows come and go and get new blocks, or nothing changes, in which case block tables need not be loaded again."""
    rng = random.Random(seed)
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    table.apply(
        Schedule(
            0, new_rows=tuple(NewRow(s, f"r{s}", (s + 1,), 1, SamplingParams(), 0, frozenset()) for s in range(SEQS))
        )
    )
    staging, computed, blocks = Staging(device(DeviceInit()), 1 << 20), [0] * SEQS, iter(range(1, 999))
    builder, slots = BatchBuilder(table, staging, SEQS * LENGTH, SIZE), list(range(SEQS))
    for _ in range(40):
        if rng.random() < 0.3:
            slots = rng.sample(range(SEQS), rng.randrange(1, SEQS + 1))
        slots = [slot for slot in slots if computed[slot] < LENGTH] or [computed.index(min(computed))]
        rows = [
            ScheduledRow(s, f"r{s}", computed[s], 1, (next(blocks),) if computed[s] % SIZE == 0 else (), True)
            for s in slots
        ]
        table.apply(Schedule(0, rows=tuple(rows)))
        staging.begin()
        inputs, deltas = builder.stage(rows, GraphKey(1, SEQS, SEQS)), table.stage(staging)
        staging.send()
        table.flush(deltas)
        builder.load(inputs)
        batch, count = inputs.attention, len(rows)
        assert batch.block_table.tolist() == [table.host_block_table[s].tolist() for s in slots] + [
            [0] * table.max_blocks
        ] * (SEQS - count)
        assert batch.seq_lens.tolist() == [computed[s] + 1 for s in slots] + [0] * (SEQS - count)
        assert inputs.positions.tolist() == [computed[s] for s in slots] + [0] * (SEQS - count)
        for slot in slots:
            computed[slot] += 1


def test_decode_steps_of_one_size_stand_at_the_same_addresses():
    """Also where some rows do not sample, so that they are staged as any others: graphs read the addresses."""
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    rows = random_decodes(random.Random(2), table)
    staging = Staging(DelayedDevice(DeviceInit()), 1 << 20)
    builder = BatchBuilder(table, staging, SEQS * LENGTH, SIZE)
    key, addresses = GraphKey(1, SEQS, SEQS), set()
    for step in ((), rows, rows[:1], [replace(row, samples=False) for row in rows]):
        staging.begin()
        inputs = builder.stage(step, key)
        batch = inputs.attention
        tensors = (inputs.input_ids, inputs.positions, inputs.token_index, inputs.slots, batch.seq_lens)
        tensors += (batch.query_start_loc, batch.slot_mapping, batch.block_table)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        staging.send()
    assert len(addresses) == 1


@pytest.mark.parametrize(("device", "found"), [(DelayedDevice, [0, 1]), (CpuDevice, [1, 1])])
def test_a_steps_buffer_is_not_touched_while_it_may_be_read(device, found):
    """A device that has computed when a call returns reads one buffer, whose addresses stay the same."""
    staging = Staging(device(DeviceInit()), 1024)
    buffers = []
    for step in range(IN_FLIGHT):
        staging.begin()
        room = staging.reserve(5, torch.int32)
        room.array[:] = step
        buffers.append(room.host)
        staging.send()
        assert room.device.tolist() == [step] * 5
    assert [buffer.tolist() for buffer in buffers] == [[value] * 5 for value in found]


def test_what_finds_no_room_in_the_buffer_is_sent_alone():
    staging = Staging(DelayedDevice(DeviceInit()), 256)
    staging.begin()
    small, large = staging.put(np.arange(9, dtype=np.float32)), staging.put(np.arange(99, dtype=np.int64))
    assert small.tolist() == [0.0] * 9, "it has not been sent yet"
    staging.send()
    assert (small.tolist(), large.tolist()) == (list(range(9)), list(range(99)))
    with pytest.raises(ValueError, match="no room"):
        staging.reserve(99, torch.int64)


def test_a_slots_next_request_finds_it_empty():
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    staging = Staging(CpuDevice(DeviceInit()), 1 << 16)
    schedules = [
        Schedule(
            0,
            new_rows=(NewRow(1, "a", (1, 2, 3), 1, SamplingParams(), 0, frozenset()),),
            rows=(ScheduledRow(1, "a", 0, 3, (50, 51, 52), True),),
        ),
        Schedule(1, released=(1,)),  # nothing runs, so the device learns of it with the next step
        Schedule(
            2,
            new_rows=(NewRow(1, "b", (7, 8), 1, SamplingParams(), 0, frozenset()),),
            rows=(ScheduledRow(1, "b", 0, 2, (9,), True),),
        ),
    ]
    for schedule in schedules:
        table.apply(schedule)
        if not schedule.is_empty:
            staging.begin()
            deltas = table.stage(staging)
            staging.send()
            table.flush(deltas)
    assert table.block_table[1].tolist() == [9] + [0] * (table.max_blocks - 1) == table.host_block_table[1].tolist()
    assert table.token_ids[1, :3].tolist() == [7, 8, 3]


def test_what_a_failed_step_left_unsent_does_not_reach_the_slots_next_request():
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    staging = Staging(CpuDevice(DeviceInit()), 1 << 16)
    first = NewRow(1, "a", tuple(range(1, 30)), 1, SamplingParams(), 0, frozenset())
    row = ScheduledRow(1, "a", 0, 29, tuple(range(50, 58)), True)
    table.apply(Schedule(0, new_rows=(first,), rows=(row,)))  # and its launch fails before anything was staged
    second = NewRow(1, "b", (7, 8), 1, SamplingParams(), 0, frozenset())
    table.apply(Schedule(1, (1,), (second,), (ScheduledRow(1, "b", 0, 2, (9,), True),)))
    staging.begin()
    deltas = table.stage(staging)
    staging.send()
    table.flush(deltas)
    assert table.block_table[1].tolist() == [9] + [0] * (table.max_blocks - 1) == table.host_block_table[1].tolist()
    assert table.token_ids[1, :3].tolist() == [7, 8, 0]


def test_taking_an_occupied_slot_is_caught():
    table = RowTable(SEQS, LENGTH, SIZE, torch.device("cpu"))
    new = NewRow(1, "a", (1, 2), 1, SamplingParams(), 0, frozenset())
    table.apply(Schedule(0, new_rows=(new,)))
    with pytest.raises(AssertionError, match="slot 1"):
        table.apply(Schedule(1, new_rows=(new,)))
    table.apply(Schedule(2, released=(1,), new_rows=(new,)))


KEYS = [GraphKey(1, 4, 4), GraphKey(1, 8, 8), GraphKey(0, 8, 32), GraphKey(2, 4, 8)]


@pytest.mark.parametrize(
    ("step", "level", "key"),
    [
        ((1, 3, 3), GraphSupport.ANY, KEYS[0]),
        ((1, 5, 5), GraphSupport.UNIFORM, KEYS[1]),
        ((0, 3, 20), GraphSupport.ANY, KEYS[2]),
        ((0, 3, 20), GraphSupport.UNIFORM, None),
        ((2, 3, 6), GraphSupport.ANY, KEYS[3]),
        ((1, 9, 9), GraphSupport.ANY, None),
        ((1, 1, 1), GraphSupport.NEVER, None),
        ((0, 3, 33), GraphSupport.ANY, None),
    ],
)
def test_the_smallest_key_that_fits(step, level, key):
    assert GraphDispatcher(KEYS, {"attention": level, "other": GraphSupport.ANY}, 64, 99).pick(*step) == key


def test_the_log_names_what_limits_graphs(caplog):
    with caplog.at_level("INFO"):
        GraphDispatcher(KEYS, {"attention": GraphSupport.ANY, "slow op": GraphSupport.UNIFORM}, 8, 32)
        GraphDispatcher(KEYS, {"attention": GraphSupport.ANY, "old op": GraphSupport.NEVER}, 8, 32)
    assert "limited to steps of equal query lengths by slow op" in caplog.text
    assert "no graphs are captured, as old op" in caplog.text


def test_keys_are_cut_to_the_largest_step():
    any_ = {"attention": GraphSupport.ANY}
    assert GraphDispatcher(KEYS, any_, 5, 20).keys == (
        GraphKey(0, 5, 20),
        GraphKey(2, 4, 8),
        GraphKey(1, 5, 5),
        GraphKey(1, 4, 4),
    )
    dispatcher = GraphDispatcher([GraphKey(1, 8, 8), GraphKey(2, 8, 16)], any_, 64, 3)
    assert dispatcher.keys == (GraphKey(1, 3, 3), GraphKey(2, 1, 2))
    assert GraphDispatcher([GraphKey(0, 64, 16)], any_, 32, 99).keys == (GraphKey(0, 16, 16),)
    dispatcher.forget(GraphKey(1, 3, 3))
    assert dispatcher.pick(1, 1, 1) is None
