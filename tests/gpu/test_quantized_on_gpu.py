"""Products with quantized weights on a GPU: `pytest -m gpu tests/gpu`, a process in which Triton does not interpret.

The kernels are imported within the tests, as importing them decides whether they are interpreted.
"""

import pytest
import torch
from quire.plugin import LinearSpec, OpInit, QuantInit, QuantLinearSpec
from quire.testing.op import OpConformance, quantized
from quire_quant.cuda_probe import missing
from quire_quant.fp8 import FP8Method
from quire_quant.testing import fp8_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
CUDA = torch.device("cuda")


def op_set():
    from quire_quant.cuda_linear import CudaQuantOps

    return CudaQuantOps(OpInit(CUDA, 256))


class TestQuantizedOnGpu(OpConformance):
    device = "cuda"

    @pytest.fixture
    def op_set(self):
        return op_set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 64, 65, 512, 1024, 1025, 2048])
@pytest.mark.parametrize(("bits", "size"), [(4, 128), (4, 32), (4, 4096), (8, 128)])
def test_a_layer_of_usual_size(bits, size, rows, dtype):
    """Against the product with the dequantized weight in float32, twice with the same bits."""
    spec = QuantLinearSpec(4096, 6144, bits, size, "integer", dtype)
    op = op_set().build(spec)
    codes = quantized(spec, torch.Generator().manual_seed(0))
    state = op.pack(*(each.to(CUDA) for each in codes))
    x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1)).to(CUDA, dtype)
    out = op(x, state)
    exact = x.double() @ op.weight(state).double().t()
    assert (out.double() - exact).norm() <= 6e-3 * exact.norm()
    assert torch.equal(op(x, state), out)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shape", [(), (1024, 1), (8, 8)])
def test_float8(shape, rows):
    """Weights kept in FP8 where the GPU can, with rounded activations; else dequantized."""
    tensors, weight = fp8_tensors(1024, 1024, shape, name="weight_scale_inv", seed=0)
    stored = {f"m.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    method = FP8Method(QuantInit({}, stored, CUDA, torch.bfloat16))
    spec = LinearSpec(1024, 1024, False, torch.bfloat16, name="m")
    linear = method.linear(spec, (spec,))
    state = linear.finalize({name: tensor.to(CUDA) for name, tensor in tensors.items()}, CUDA)
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = linear.forward(x.to(CUDA), state, None).cpu().double()
    exact = x.double() @ weight.t()
    assert (out - exact).norm() <= 0.04 * exact.norm()
