"""Products on a CPU over all numbers of rows at which paths change, over x that lies anyhow in memory."""

import pytest
import torch
from quire.plugin import LinearSpec, OpInit, QuantInit, QuantLinearSpec
from quire.testing.op import quantized
from quire_cpu_ref.ops import TorchOps
from quire_quant.fp8 import FP8Method
from quire_quant.kernels import DequantOps, Int4PackOps
from quire_quant.testing import fp8_tensors

INPUTS = 256
CPU = torch.device("cpu")
INIT = OpInit(CPU, 512)
ROWS = (0, 1, 3, 4, 5, 17, 512)
LAYOUTS = {
    "contiguous": lambda rows: normal(rows, INPUTS),
    "sliced": lambda rows: normal(rows, INPUTS + 7)[:, 3 : INPUTS + 3],
    "every other": lambda rows: normal(rows, 2 * INPUTS)[:, ::2],
    "transposed": lambda rows: normal(INPUTS, rows).t(),
    "shifted": lambda rows: normal(rows * INPUTS + 1)[1:].view(rows, INPUTS),
}
"""How x may lie: between other values, apart in both dimensions, and at addresses that are not aligned."""


def normal(*shape):
    """Random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.bfloat16)


def layer(ops, group_size, *, outputs=80, deterministic=False):
    """An operation with a state of random codes."""
    size = INPUTS if group_size == -1 else group_size
    spec = QuantLinearSpec(INPUTS, outputs, 4, size, "integer", torch.bfloat16, deterministic)
    assert ops(INIT).why_not(spec) == []
    op = ops(INIT).build(spec)
    return op, op.pack(*quantized(spec, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("layout", "group_size"),
    [*(("sliced", size) for size in (32, 64, 128, -1)), *((name, 32) for name in LAYOUTS if name != "sliced")],
)
@pytest.mark.parametrize("ops", [Int4PackOps, DequantOps])
def test_products_are_by_the_weight_that_is_told(ops, group_size, layout):
    """80 outputs are no multiple of the 64 that the int4 operation takes at once."""
    op, state = layer(ops, group_size)
    weight, bias = op.weight(state).double(), normal(80)
    for rows in ROWS:
        x = LAYOUTS[layout](rows)
        exact = x.double() @ weight.t()
        for added in (None, bias):
            out = op(x, state, added)
            assert out.dtype is torch.bfloat16
            expected = exact if added is None else exact + bias.double()
            assert (out.double() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("ops", [Int4PackOps, DequantOps])
def test_a_row_of_a_batch_is_the_row_alone(ops, deterministic):
    """Bit for bit, asked for or not."""
    op, state = layer(ops, 64, outputs=208, deterministic=deterministic)
    x = normal(512, INPUTS)
    for rows in ROWS[1:]:
        whole = op(x[:rows], state)
        for row in {0, rows // 2, rows - 1}:
            assert torch.equal(op(x[row : row + 1], state)[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_by_an_fp8_weight_is_the_row_alone(dtype):
    """The layer was not asked to be deterministic; the operation that multiplies for it is."""
    tensors, _ = fp8_tensors(INPUTS, 80, (), seed=0)
    stored = {f"l.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    spec = LinearSpec(INPUTS, 80, False, dtype, name="l")
    linear = FP8Method(QuantInit({}, stored, CPU, dtype, op=TorchOps(INIT).build)).linear(spec, (spec,))
    state = linear.finalize(tensors, CPU)
    x = normal(512, INPUTS).to(dtype)
    for rows in ROWS[1:]:
        whole = linear.forward(x[:rows], state, None)
        for row in {0, rows // 2, rows - 1}:
            assert torch.equal(linear.forward(x[row : row + 1], state, None)[0], whole[row])
