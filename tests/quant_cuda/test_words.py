"""Packed words hold each code where the kernels look for it; launches fit what they are given."""

import re
from pathlib import Path

import pytest
import quire_quant.cuda_kernels
import torch
from hypothesis import given
from hypothesis import strategies as st
from quire_quant.cuda_launches import FEW_ROWS, FUSED_ROWS, MAX_SPLIT, MIN_BLOCK_M, SPLIT_TILES, launch_for, split_for
from quire_quant.cuda_words import pack, unit_of


def code_at(words, k, n, bits):
    """The code of input k and output n, by the definition in `cuda_words`."""
    tile, segment, within = k // 128, k % 128 // 32, k % 32
    if bits == 4:
        half, r = divmod(within, 16)
        word, shift = 16 * tile + r, 4 * (segment + 4 * half)
    else:
        word, shift = 32 * tile + within, 8 * segment
    return (words[word][n] >> shift) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_has_its_place(bits):
    codes = torch.randint(0, 1 << bits, (9, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[:, ::3] = (1 << bits) - 1  # the sign bit of words
    packed = pack(codes, torch.ones(9, 7), None, bits, 32)
    assert packed.data.shape == (256 * bits // 32, 128)
    assert packed.num_tiles == 2
    words = packed.data.tolist()
    assert [[code_at(words, k, n, bits) for k in range(200)] for n in range(9)] == codes.tolist()
    assert all(code_at(words, 255, n, bits) == 0 for n in range(9))


@pytest.mark.parametrize(
    ("group_size", "inputs", "unit"),
    [(32, 256, 32), (64, 256, 64), (96, 192, 32), (128, 256, 128), (384, 768, 128), (320, 640, 64), (200, 200, 128)],
)
def test_scales_stand_in_rows_for_parts_of_a_tile(group_size, inputs, unit):
    groups = -(-inputs // group_size)
    scales = torch.arange(1.0, 2 * groups + 1).view(2, groups)
    packed = pack(torch.zeros(2, inputs, dtype=torch.uint8), scales, scales + 3, 4, group_size)
    assert packed.unit == unit
    for k in range(inputs):
        assert torch.equal(packed.scales[k // unit, :2], scales[:, k // group_size])
        assert torch.equal(packed.zeros[k // unit, :2].float(), scales[:, k // group_size] + 3)
    assert not packed.scales[:, 2:].any()
    assert len(packed.scales) == -(-inputs // 128) * 128 // unit


def test_groups_that_end_within_a_segment_have_no_unit():
    assert unit_of(24, 48) is None
    assert unit_of(48, 96) is None
    assert unit_of(48, 48) == 128


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.1, torch.float32), (0.0999755859375, torch.float16), (2.0**-40, torch.bfloat16)]
)
def test_scales_are_narrowed_only_where_that_loses_nothing(value, dtype):
    scales = torch.full((1, 1), value)
    packed = pack(torch.zeros(1, 128, dtype=torch.uint8), scales, None, 4, 128)
    assert packed.scales.dtype is dtype
    assert packed.scales[0, 0].float() == scales[0, 0]


@given(
    rows=st.integers(1, FUSED_ROWS),
    outputs=st.integers(1, 1200),
    inputs=st.integers(1, 250),
    capability=st.sampled_from([(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]),
    bits=st.sampled_from([4, 8]),
)
def test_splits_leave_each_program_some_work(rows, outputs, inputs, capability, bits):
    launch = launch_for(rows, bits, capability)
    assert launch.few == (rows <= FEW_ROWS)
    # counters are allocated for so many row tiles
    assert -(-rows // launch.block_m) <= FUSED_ROWS // MIN_BLOCK_M
    split = split_for(launch, rows, outputs, inputs, 132)
    assert split in {1, 2, 4, 8, MAX_SPLIT}
    assert split == 1 or inputs >= split * SPLIT_TILES
    programs = outputs * -(-rows // launch.block_m)
    assert split == 1 or programs * split < 2 * launch.waves * 132


def test_the_instruction_does_what_the_interpreter_computes():
    """lop3's table is that of (word & mask) | offset, and its offsets are 128 in bfloat16 and 1024 in float16."""
    text = Path(quire_quant.cuda_kernels.__file__).read_text(encoding="utf-8")
    found = re.findall(r"lop3.b32 t, \$2, (0x\w+), (0x\w+), (0x\w+);", text)
    offsets = {torch.bfloat16: 128.0, torch.float16: 1024.0}
    assert len(found) == len(offsets)
    for (mask, magic, table), (dtype, offset) in zip(found, offsets.items(), strict=True):
        mask, magic, table = int(mask, 16), int(magic, 16), int(table, 16)
        # the index of a bit in the table is made of the three operands' bits, the first highest
        assert [(table >> i) & 1 for i in range(8)] == [(i >> 2 & i >> 1 & 1) | (i & 1) for i in range(8)]
        for word in (0x00000000, 0x76543210, 0xFEDCBA98, 0xFFFFFFFF):
            both = (word & mask) | magic
            halves = torch.tensor([both & 0xFFFF, both >> 16]).to(torch.int16).view(dtype).float() - offset
            assert halves.tolist() == [word & 15, word >> 16 & 15]
