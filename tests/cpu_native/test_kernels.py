"""Kernels against float64 over random shapes; a row's bits alone, in a batch, and with any number of threads."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.plugin import GatedActSpec, LinearSpec, OpInit, QuantLinearSpec, RMSNormSpec
from quire.testing.op import quantized
from quire_cpu_native import ops
from quire_cpu_native.build import FLAGS, built, missing
from quire_cpu_native.codes import NativeQuantLinear
from quire_cpu_native.native import Native
from quire_cpu_native.ops import NativeA8Ops, NativeOps

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
EDGES = (1, 2, 5, 6, 7, 13, 23, 24, 25, 64, 600)


@pytest.fixture(scope="module")
def threads():
    """Op sets over pools of one, two and five threads."""

    def with_pool(count):
        made = NativeOps(OpInit(torch.device("cpu"), 1024))
        made._native = Native(built(), count)
        return made

    return {count: with_pool(count) for count in (1, 2, 5)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unaligned(rows, columns, dtype, generator):
    """Rows that are apart, and start anywhere."""
    return torch.randn(rows, columns + 5, generator=generator).to(dtype)[:, 3 : columns + 3]


def spec_of(inputs, outputs, dtype, bits):
    if bits is None:
        return LinearSpec(inputs, outputs, True, dtype)
    group = (32, 40, inputs)[inputs % 3]
    return QuantLinearSpec(inputs, outputs, bits, group, ("middle", "integer", "real")[outputs % 3], dtype)


def packed(op_set, spec, generator):
    """(x -> result, the weight that it multiplies by, the bias)."""
    bias = torch.randn(spec.out_features, generator=generator).to(spec.dtype)
    op = op_set.build(spec)
    if isinstance(spec, LinearSpec):
        weight = (torch.randn(spec.out_features, spec.in_features, generator=generator) / spec.in_features**0.5).to(
            spec.dtype
        )
        state = op.pack(weight, bias)
        return (lambda x: op(x, state)), weight, bias
    state = op.pack(*quantized(spec, generator))
    return (lambda x: op(x, state, bias)), op.weight(state), bias


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40) | st.sampled_from(EDGES),
    inputs=st.integers(1, 200) | st.sampled_from([512, 777]),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(list(DTYPES)),
    bits=st.sampled_from([None, 4, 6, 8, 3]),
    count=st.sampled_from([1, 2, 5]),
)
def test_linears(threads, rows, inputs, outputs, dtype, bits, count):
    spec, generator = spec_of(inputs, outputs, dtype, bits), seeded(rows)
    run, weight, bias = packed(threads[count], spec, generator)
    x = unaligned(rows, inputs, dtype, generator)
    ours, exact = run(x), x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(ours.double(), exact, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("bits", [None, 4, 6, 8])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(threads, bits, dtype):
    spec = spec_of(512 if bits else 511, 333, dtype, bits)
    runs = [packed(threads[count], spec, seeded(0))[0] for count in (1, 2, 5)]
    x = torch.randn(600, spec.in_features, generator=seeded(1)).to(dtype)
    whole = runs[0](x)
    for run in runs:
        for first, last in ((0, 600), *((17, 17 + count) for count in (1, 2, 3, 4, 5, 6, 7, 30, 97))):
            assert torch.equal(run(x[first:last].clone()), whole[first:last]), (first, last)


A8_SPAN = 32
"""Inputs of a group that share a scale, where they become whole numbers of 8 bits."""


def by_8_bit_inputs(op_set, spec, generator):
    """(x -> result, the weight)"""
    op = NativeQuantLinear(spec, op_set._native, "codes_linear_a8")
    state = op.pack(*quantized(spec, generator))
    return (lambda x: op(x, state)), op.weight(state)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40) | st.sampled_from(EDGES),
    inputs=st.integers(1, 200) | st.sampled_from([512, 777]),
    outputs=st.integers(1, 200),
    bits=st.sampled_from([8, 6, 5, 4, 3]),
    count=st.sampled_from([1, 2, 5]),
)
def test_inputs_of_8_bits_are_off_by_half_a_step_at_most(threads, rows, inputs, outputs, bits, count):
    spec, generator = spec_of(inputs, outputs, torch.bfloat16, bits), seeded(rows)
    run, weight = by_8_bit_inputs(threads[count], spec, generator)
    x = unaligned(rows, inputs, torch.bfloat16, generator)
    size, steps = spec.group_size, torch.zeros(rows, inputs, dtype=torch.float64)
    for group in range(0, inputs, size):
        for first in range(group, min(group + size, inputs), A8_SPAN):
            span = slice(first, min(first + A8_SPAN, group + size, inputs))
            steps[:, span] = x[:, span].double().abs().amax(-1, keepdim=True) / 127
    exact, allowed = x.double() @ weight.double().T, steps / 2 @ weight.double().abs().T
    # The weight as it is told is rounded to bfloat16, which the kernel's is not.
    told = x.double().abs() @ weight.double().abs().T / 512
    error = (run(x).double() - exact).abs()
    assert (error <= 1.001 * allowed + told + exact.abs() / 128 + 1e-4).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("zeros", ["middle", "integer"])
def test_the_outermost_codes_and_inputs_do_not_saturate(threads, bits, zeros):
    """All of them at once: every sum is exact, so the result is that of float64, rounded once."""
    spec, top = QuantLinearSpec(64, 4, bits, 32, zeros, torch.bfloat16), (1 << bits) - 1
    codes = torch.tensor([0, top, 0, top], dtype=torch.uint8)[:, None].repeat(1, 64)
    codes[2:, ::2] = top - codes[2:, ::2]
    zero = None if zeros == "middle" else torch.tensor([0.0, top, 3.0, 0.0])[:, None].repeat(1, 2)
    op = NativeQuantLinear(spec, threads[1]._native, "codes_linear_a8")
    state = op.pack(codes, torch.ones(4, 2), zero)
    x = torch.full((3, 64), 127.0, dtype=torch.bfloat16)
    x[1] = -127.0
    x[2, ::2] = -127.0
    taken = torch.full((4, 1), float(1 << (bits - 1))) if zero is None else zero[:, :1]
    exact = x.double() @ (codes.double() - taken.double()).T
    assert torch.equal(op(x, state), exact.bfloat16())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_row_of_8_bit_inputs_has_the_same_bits_in_any_batch(threads, bits):
    spec = spec_of(512, 333, torch.bfloat16, bits)
    runs = [by_8_bit_inputs(threads[count], spec, seeded(0))[0] for count in (1, 2, 5)]
    x = torch.randn(600, 512, generator=seeded(1)).bfloat16()
    whole = runs[0](x)
    for run in runs:
        for first, last in ((0, 600), *((17, 17 + count) for count in (1, 2, 3, 4, 5, 30))):
            assert torch.equal(run(x[first:last].clone()), whole[first:last]), (first, last)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("isa", list(FLAGS))
def test_inputs_that_may_have_8_bits_get_them_where_that_is_fast(isa, dtype, monkeypatch):
    monkeypatch.setattr(ops, "best_isa", lambda: isa)
    op_set, spec = NativeOps(OpInit(torch.device("cpu"), 16)), spec_of(512, 70, dtype, 4)
    x = torch.randn(3, 512, generator=seeded(1)).to(dtype)

    def result(op):
        return op(x, op.pack(*quantized(spec, seeded(0))))

    eight = isa in ops.FAST_BYTES and dtype is torch.bfloat16
    kernel = ops.A8 if eight else ops.A16
    named, allowed = NativeQuantLinear(spec, op_set._native, kernel), op_set.build(replace(spec, input_bits=8))
    assert torch.equal(result(allowed), result(named))
    assert torch.equal(result(op_set.build(spec)), result(NativeQuantLinear(spec, op_set._native)))
    assert torch.equal(result(allowed), result(op_set.build(spec))) is not eight


def test_inputs_of_8_bits_are_for_bfloat16():
    op_set = NativeA8Ops(OpInit(torch.device("cpu"), 16))
    for bits in (4, 6, 8):
        assert op_set.why_not(QuantLinearSpec(64, 64, bits, 32, "middle", torch.bfloat16)) == []
    assert "not for float32" in op_set.why_not(QuantLinearSpec(64, 64, 4, 32, "middle", torch.float32))[0]


@pytest.mark.parametrize(("bits", "packed_bits"), [(3, 4), (4, 4), (5, 8), (6, 6), (7, 8), (8, 8)])
def test_codes_take_the_bits_that_they_are_packed_in_and_come_back_as_they_were(bits, packed_bits):
    spec = QuantLinearSpec(96, 128, bits, 32, "middle", torch.float32)
    op = NativeOps(OpInit(torch.device("cpu"), 16)).build(spec)
    codes = torch.arange(128 * 96, dtype=torch.int32).mul(37).view(128, 96).remainder(1 << bits).byte()
    state = op.pack(codes, torch.ones(128, 3), None)
    assert sum(tensor.nbytes for tensor in state.tensors) == 128 * 96 * packed_bits // 8 + 128 * 3 * 2
    assert torch.equal(op.weight(state), codes.float() - (1 << (bits - 1)))


def test_many_calls_from_many_threads_at_once(threads):
    """The pool belongs to one call at a time; sleepers wake, and no task is lost or done twice."""
    from concurrent.futures import ThreadPoolExecutor

    run, _, _ = packed(threads[5], LinearSpec(64, 640, True, torch.float32), seeded(0))
    x = torch.randn(3, 64, generator=seeded(1))
    wanted = run(x)
    with ThreadPoolExecutor(4) as callers:
        assert all(torch.equal(found, wanted) for found in callers.map(lambda _: run(x), range(400)))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    size=st.integers(1, 300),
    dtype=st.sampled_from(list(DTYPES)),
    offset=st.sampled_from([0.0, 1.0]),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
)
def test_rows(threads, rows, size, dtype, offset, activation):
    generator, tolerance = seeded(size), DTYPES[dtype]
    x, residual = (torch.randn(rows, size, generator=generator).to(dtype) for _ in range(2))
    weight, total = torch.rand(size, generator=generator).to(dtype), x + residual
    norm = threads[2].build(RMSNormSpec(size, 1e-6, dtype, offset))
    normed, kept = norm(x, weight, residual.clone())
    wide = total.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
    torch.testing.assert_close(normed.double(), exact, atol=tolerance, rtol=tolerance)
    assert torch.equal(kept, total)
    both = unaligned(rows, 2 * size, dtype, generator) * 4
    gate, up = both.double().chunk(2, -1)
    functional = torch.nn.functional
    activated = (
        functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate=activation[5:] or "none")
    )
    ours = threads[2].build(GatedActSpec(size, activation, dtype))(both)
    torch.testing.assert_close(ours.double(), activated * up, atol=tolerance, rtol=tolerance)


def test_values_that_are_no_numbers_stay_so(threads):
    for dtype in DTYPES:
        run, _, _ = packed(threads[1], spec_of(96, 70, dtype, 4), seeded(0))
        x = torch.ones(3, 96, dtype=dtype)
        x[1, 5] = float("nan")
        found = run(x).isnan()
        assert found[1].all()
        assert not found[::2].any()


def test_other_dtypes_are_left_to_others():
    op_set = NativeOps(OpInit(torch.device("cpu"), 16))
    assert "not for float16" in op_set.why_not(LinearSpec(8, 8, False, torch.float16))[0]


def test_a_function_keeps_its_threads():
    run, x, out = Native(built(), 2).function("gated_act", torch.float32), torch.randn(3, 16), torch.empty(3, 8)
    gc.collect()
    run(x.data_ptr(), 16, out.data_ptr(), 3, 8, 0)
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :8]) * x[:, 8:])
