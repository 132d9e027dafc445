"""The kernels in Triton's interpreter against float64, in all launches that the table has."""

import pytest
import quire_quant.cuda_linear
import torch
from quire.plugin import QuantLinearSpec
from quire.testing.op import OpConformance, quantized
from quire_quant.cuda_launches import Launch
from quire_quant.cuda_linear import CudaQuantLinear, CudaQuantOps, Gpu

HOPPER, AMPERE = Gpu((9, 0), 4, native=False), Gpu((8, 0), 4, native=False)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def meaning(spec, codes, scales, zeros):
    """The weight, float64."""
    group = torch.arange(spec.in_features) // spec.group_size
    shift = float(1 << (spec.bits - 1)) if zeros is None else zeros.double()[:, group]
    return (codes.double() - shift) * scales.double()[:, group]


def check(spec, gpu, rows, *, bias=False, seed=0):
    """A product against float64; x's rows lie apart, and begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    codes = quantized(spec, generator)
    op = CudaQuantLinear(spec, gpu)
    state = op.pack(*codes)
    x = torch.randn(rows, spec.in_features + 5, generator=generator).to(spec.dtype)[:, 3:-2]
    added = torch.randn(spec.out_features, generator=generator).to(spec.dtype) if bias else None
    out = op(x, state, added)
    exact = x.double() @ meaning(spec, *codes).t() + (0 if added is None else added.double())
    assert out.dtype is spec.dtype
    assert (out.double() - exact).norm() <= TOLERANCE[spec.dtype] * exact.norm()
    assert not state.counters.any()
    return op, state, x, out


def cases(rows, wide):
    """inputs, outputs, bits, group size, zeros, rows, dtype: each kind of group with another number of rows."""
    half, brain = torch.float16, torch.bfloat16
    groups = [(256, 4, 128, "integer"), (192, 4, 32, "integer"), (256, 4, 64, "middle"), (200, 8, 200, "integer"),
              (256, 8, 128, "middle"), (192, 3, 96, "integer")]  # fmt: skip
    for index, count in enumerate(rows):
        for inputs, bits, size, kind in groups if wide else [groups[index % len(groups)]]:
            dtype = brain if (index + bits) % 2 else half
            yield pytest.param(
                QuantLinearSpec(inputs, 130 if wide else 40, bits, size, kind, dtype),
                count,
                marks=pytest.mark.kernels if wide else (),
                id=f"{'wide-' if wide else ''}{count}x{inputs}-{bits}bit-{size}-{kind}-{dtype}",
            )


@pytest.mark.parametrize(
    ("spec", "rows"),
    [*cases((1, 17, 65, 64, 3, 16, 0), wide=False), *cases((1, 3, 16, 17, 64, 65, 512), wide=True)],
)
def test_products(spec, rows):
    check(spec, HOPPER, rows, bias=rows % 2 == 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wide", [False, True])
def test_narrow_and_wide_products_agree(bits, wide):
    """Hopper's and Ampere's launches take inputs in other bites, but the same ones."""
    spec = QuantLinearSpec(128, 20, bits, 32, "integer", torch.float16)
    op, state, x, out = check(spec, HOPPER, 34)
    other = op._fused(x, state, None, Launch(False, 64, 4, 3, wide), 1)
    torch.testing.assert_close(other, out, rtol=2e-3, atol=2e-3)


def test_inputs_are_split_and_summed_in_order():
    """Whoever arrives last adds the same parts in the same order, and leaves the counters as they were."""
    spec = QuantLinearSpec(520, 20, 4, 128, "integer", torch.float16)
    op, state, x, out = check(spec, HOPPER, 2)
    launch = Launch(True, 16, 4, 4)
    bias = torch.randn(20, generator=torch.Generator().manual_seed(2)).half()
    first, again = (op._fused(x, state, bias, launch, 3) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, out + bias, rtol=2e-3, atol=2e-3)
    assert not state.counters.any()


def test_many_rows_are_multiplied_by_the_weight_in_parts(monkeypatch):
    spec = QuantLinearSpec(128, 300, 4, 64, "integer", torch.float16)
    _, _, _, whole = check(spec, AMPERE, 1025, bias=True)
    monkeypatch.setattr(quire_quant.cuda_linear, "SCRATCH_BYTES", 128 * 128 * 2 + 1)
    _, _, _, parts = check(spec, AMPERE, 1025, bias=True)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (3, 64), (8, 150)])
def test_the_weight_is_rounded_once(bits, size, dtype):
    spec = QuantLinearSpec(150, 30, bits, size, "integer", dtype)
    codes = quantized(spec, torch.Generator().manual_seed(1))
    op = CudaQuantLinear(spec, HOPPER)
    assert torch.equal(op.weight(op.pack(*codes)), meaning(spec, *codes).to(dtype))


def test_the_deterministic_form_does_not_see_how_many_rows_there_are():
    spec = QuantLinearSpec(1024, 24, 4, 128, "integer", torch.float16, deterministic=True)
    op, state, x, out = check(spec, HOPPER, 66)
    assert torch.equal(op(x[65:], state), out[65:])


def test_deterministic_launches_are_all_the_same(monkeypatch):
    """Other splits differ in bits that rounding mostly hides, so what is launched is looked at."""
    launched = []
    monkeypatch.setattr(CudaQuantLinear, "_fused", lambda self, x, *rest: launched.append(rest[2:]) or x)
    spec = QuantLinearSpec(1024, 24, 4, 128, "integer", torch.float16, deterministic=True)
    op = CudaQuantLinear(spec, Gpu((9, 0), 1, native=False))
    state = op.pack(*quantized(spec, torch.Generator().manual_seed(0)))
    for rows in (1, 64, 65, 1100):
        op(torch.zeros(rows, 1024, dtype=torch.float16), state)
    assert len(launched) == 5
    assert len(set(launched)) == 1


def test_what_it_cannot_serve_is_left_to_others():
    ops = CudaQuantOps(OpConformance.init())

    def reasons(**changes):
        return ops.why_not(QuantLinearSpec(**({
            "in_features": 128, "out_features": 8, "bits": 4, "group_size": 32, "zeros": "integer",
            "dtype": torch.float16,
        } | changes)))  # fmt: skip

    assert reasons() == []
    assert "float32" in reasons(dtype=torch.float32)[0]
    assert "whole numbers" in reasons(zeros="real")[0]
    assert "groups of 48" in reasons(group_size=48)[0]


@pytest.mark.kernels
class TestCudaQuantOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return CudaQuantOps(self.init())
