"""What the kit does not vary: tables that are cut from wider ones, long contexts in parts, many query heads."""

import pytest
import torch
from quire.plugin import AttentionBatch, AttentionInit, AttentionLayer
from quire_cpu_native.attention import NativeAttention
from quire_cpu_native.build import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BLOCK = 16


def batch_of(lengths, queries, tables):
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    tokens = int(starts[-1])
    return AttentionBatch(
        num_reqs=len(lengths),
        num_tokens=tokens,
        uniform_query_len=0,
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_size=BLOCK,
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_table=tables,
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        query_start_loc_host=starts,
        seq_lens_host=seq_lens,
    )


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(
    ("kv_heads", "dim", "dtype"), [(1, 32, torch.float32), (4, 24, torch.float32), (4, 40, torch.bfloat16)]
)
def test_long_contexts_are_computed_in_parts_with_the_same_bits(window, kv_heads, dim, dtype):
    """One row alone is split over its positions, several are not, and their heads go together; the table is part of
    a wider one."""
    torch.manual_seed(0)
    heads, group, length = 4 * kv_heads, 4, 1300
    layer = AttentionLayer(0, heads, kv_heads, dim, dim, 0.2, window)
    init = AttentionInit(torch.device("cpu"), dtype, (layer,), BLOCK, 16, 64, 100)
    backend = NativeAttention(init)
    blocks = -(-length // BLOCK)
    kv = tuple(torch.randn(blocks + 1, BLOCK, kv_heads, dim, dtype=dtype) for _ in range(2))
    order = (torch.randperm(blocks) + 1).int()
    wide = torch.zeros(12, blocks + 7, dtype=torch.int32)
    wide[:, :blocks] = order
    q = torch.randn(36, heads, dim, dtype=dtype)
    alone, together = torch.empty(3, heads, dim, dtype=dtype), torch.empty(36, heads, dim, dtype=dtype)
    for out, rows in ((alone, 1), (together, 12)):
        batch = batch_of([length] * rows, [3] * rows, wide[:rows, :blocks])
        backend.forward(layer, q[: 3 * rows], q, q, kv, batch, backend.plan(batch), out)
    assert torch.equal(alone, together[:3])
    keys, values = (cache[order.long()].flatten(0, 1)[:length].double() for cache in kv)
    tolerance = 2e-5 if dtype is torch.float32 else 1e-2
    for index in range(3):
        position = length - 3 + index
        seen = slice(0 if window is None else position - window + 1, position + 1)
        for head in range(heads):
            query, of_head = q[index, head].double(), head // group
            weights = (keys[seen, of_head] @ query * 0.2).softmax(-1)
            expected = weights @ values[seen, of_head]
            torch.testing.assert_close(alone[index, head].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 37])
def test_nothing_is_read_beside_what_a_query_sees(window):
    """Tokens are multiplied by pairs and by sixteens; what lies beside those seen in a block may be anything. The scale
    may be negative."""
    torch.manual_seed(1)
    layer = AttentionLayer(0, 3, 1, 40, 40, -0.3, window)
    backend = NativeAttention(AttentionInit(torch.device("cpu"), torch.bfloat16, (layer,), BLOCK, 16, 64, 100))
    for length in (1, 2, 17, 33, 51, 257, 300):
        blocks = -(-length // BLOCK)
        kv = tuple(torch.randn(blocks, BLOCK, 1, 40, dtype=torch.bfloat16) for _ in range(2))
        seen = slice(max(0, length - window) if window else 0, length)
        for cache in kv:
            rows = cache.flatten(0, 1)
            rows[: seen.start] = rows[seen.stop :] = float("nan")
        q, out = torch.randn(1, 3, 40, dtype=torch.bfloat16), torch.empty(1, 3, 40, dtype=torch.bfloat16)
        batch = batch_of([length], [1], torch.arange(blocks).int()[None])
        backend.forward(layer, q, q, q, kv, batch, backend.plan(batch), out)
        keys, values = (cache.flatten(0, 1)[seen, 0].double() for cache in kv)
        expected = (q[0].double() @ keys.T * -0.3).softmax(-1) @ values
        torch.testing.assert_close(out[0].double(), expected, atol=1e-2, rtol=1e-2)


def test_limits_are_told():
    def reasons(heads, dim):
        return NativeAttention.supports(AttentionLayer(0, heads, 1, dim, dim, 1.0), torch.float32, "cpu", 16)

    assert reasons(64, 128) == []
    assert "more than 64 query heads" in reasons(65, 128)[0]
    assert "above 1024" in reasons(1, 1025)[0]
