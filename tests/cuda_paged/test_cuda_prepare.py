"""The fused preparation of a layer's q, k and v: odd sizes, every dtype and cache, tensors that lie apart."""

import dataclasses

import pytest
import torch
from quire.contract.attention import AttentionBackend, AttentionInit, AttentionLayer
from quire.testing.attention_problems import make_step
from quire_cuda_paged.attention import CudaPagedAttention
from quire_cuda_paged.prepare import can_fuse

LENS = ([1, 3], [4, 0])
SIZES = [(3, 1, 24, 24, 8), (9, 3, 80, 40, 80), (10, 2, 96, 96, 48)]
"""Query heads, KV heads, head size, value head size, rotated elements."""

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""A sum of two products, each rounded, of numbers of order one."""


def make(sizes, dtype, kv_dtype="auto", **options):
    heads, kv_heads, head_dim, v_head_dim, rotary_dim = sizes
    layer = AttentionLayer(0, heads, kv_heads, head_dim, v_head_dim, 0.1)
    init = AttentionInit(torch.device("cpu"), dtype, (layer,), 16, 4, 8, 4, kv_dtype=kv_dtype)
    backend = CudaPagedAttention(init)
    return backend, make_step(backend, LENS, dtype, norms="both", rotary_dim=rotary_dim, **options)


def fused_and_composed(backend, step):
    """Results and caches of both."""
    found = []
    for kind in (CudaPagedAttention, AttentionBackend):
        one = dataclasses.replace(step, kv=tuple(cache.clone() for cache in step.kv))
        found.append([item.float() for item in (*kind.prepare_qkv(backend, one), *one.kv)])
    return found


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes_in_every_dtype(sizes, dtype, kv_dtype):
    """Within the rounding of the composition, which rounds cosines, sines and every product to the compute dtype."""
    backend, step = make(sizes, dtype, kv_dtype)
    assert can_fuse(step)
    for ours, exact in zip(*fused_and_composed(backend, step), strict=True):
        step_of_8_bits = (2**-9, 0.13) if kv_dtype != "auto" else (0.0, 0.0)
        atol, rtol = ROUNDING[dtype] + step_of_8_bits[0], ROUNDING[dtype] + step_of_8_bits[1]
        torch.testing.assert_close(ours, exact, atol=atol, rtol=rtol)


def test_rows_may_lie_apart():
    backend, step = make(SIZES[0], torch.float32, style="gptj")
    wide = torch.randn(4, step.qkv.shape[1] + 7)
    angles = torch.randn(4, 30)
    apart = dataclasses.replace(step, qkv=wide[:, 3:-4], cos=angles[:, :4].cos(), sin=angles[:, 10:14])
    assert can_fuse(apart)
    for ours, exact in zip(*fused_and_composed(backend, apart), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_read_is_left_to_the_composition():
    backend, step = make(SIZES[0], torch.float32)
    columns = dataclasses.replace(step, qkv=step.qkv.t().contiguous().t())
    assert not can_fuse(columns)
    for ours, exact in zip(*fused_and_composed(backend, columns), strict=True):
        assert torch.equal(ours, exact)
