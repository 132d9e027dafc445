"""Packing, against Python's integers and the worked words of the formats."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from quire_quant.awq import _columns
from quire_quant.bits import pack, unpack
from quire_quant.testing import pack_awq, pack_down, stream

WORDS = torch.tensor([[0x76543210, 0x75316420]], dtype=torch.int32)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**32))
def test_packing_is_the_stream_of_bits_and_unpacking_its_inverse(bits, count, columns, seed):
    codes = torch.randint(0, 1 << bits, (count, columns), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert torch.equal(words, pack_down(codes, bits))
    assert torch.equal(unpack(words, bits, count).long(), codes)


def test_worked_words():
    rising = torch.arange(8)[:, None]
    assert hex(pack(rising, 4).item()) == "0x76543210"
    assert hex(pack((rising + 2) % 16, 4).item() & 0xFFFFFFFF) == "0x98765432"
    assert hex(stream([6, 15, 2, 14, 0, 1, 4, 8], 4)[0] & 0xFFFFFFFF) == "0x8410e2f6"
    assert pack_awq(rising.t()).item() == WORDS[0, 1]


def test_awq_order_is_undone():
    assert _columns(WORDS[:, 1:]).tolist() == [list(range(8))]
