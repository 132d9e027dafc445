"""The fused operations pass the kit in Triton's interpreter, and round as torch's own do."""

import pytest
import torch
from quire.plugin import GatedActSpec, LinearSpec, RMSNormSpec
from quire.testing.op import OpConformance
from quire_cpu_ref.ops import TorchOps
from quire_cuda_paged.ops import MAX_NORM_SIZE, CudaOps


class TestCudaOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return CudaOps(self.init())


@pytest.fixture
def both():
    return CudaOps(OpConformance.init()), TorchOps(OpConformance.init())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_round_as_the_reference(both, dtype, offset):
    """All but a few results have the same bits; those differ in the last, by the order of a sum."""
    x, residual = (torch.randn(20, 300, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    weight = torch.rand(300).to(dtype)
    spec = RMSNormSpec(300, 1e-6, dtype, offset)
    (ours, _), (exact, _) = (ops.build(spec)(x.clone(), weight, residual.clone()) for ops in both)
    assert (ours == exact).float().mean() > 0.99


def test_the_sum_takes_the_residuals_place(both):
    x, residual = torch.ones(3, 8), torch.ones(3, 8)
    _, kept = both[0].build(RMSNormSpec(8, 1e-6, torch.float32))(x, torch.ones(8), residual)
    assert kept is residual
    assert torch.equal(residual, torch.full((3, 8), 2.0))


def test_rows_may_lie_apart(both):
    wide = torch.randn(5, 100)
    weight = torch.rand(40)
    for view in (wide[:, 10:50], wide.t()[:40, :5].t()):
        norms = [ops.build(RMSNormSpec(40, 1e-6, torch.float32))(view.clone(), weight)[0] for ops in both]
        torch.testing.assert_close(both[0].build(RMSNormSpec(40, 1e-6, torch.float32))(view, weight)[0], norms[1])
        gated = GatedActSpec(20, "silu", torch.float32)
        torch.testing.assert_close(both[0].build(gated)(view), both[1].build(gated)(view.contiguous()))


def test_what_it_cannot_serve_is_left_to_others(both):
    ops = both[0]
    assert "linear" in ops.why_not(LinearSpec(8, 8, False, torch.float32))[0]
    assert str(MAX_NORM_SIZE) in ops.why_not(RMSNormSpec(MAX_NORM_SIZE + 1, 1e-6, torch.float32))[0]
    assert "float64" in ops.why_not(GatedActSpec(8, "silu", torch.float64))[0]
