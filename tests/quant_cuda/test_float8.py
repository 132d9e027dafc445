"""FP8 products: rounded activations, and operands as torch and cuBLAS want them, against float64.

torch multiplies with scales by row on a CPU too; scales by block are multiplied here by their definition, after the
checks that cuBLAS makes on a GPU, or should make.
"""

import pytest
import quire_quant.fp8
import torch
from quire.plugin import LinearSpec, QuantInit
from quire_quant.float8_linear import Float8Weight, rounded
from quire_quant.fp8 import FP8Method
from quire_quant.scaled_mm import Facts, why_not
from quire_quant.testing import fp8_tensors
from torch import Tensor

HOPPER = Facts((9, 0), (13, 0))
LARGEST = 448.0


def by_definition(small, weight, *, scale_a, scale_b, bias, out_dtype):
    """The product with scales of 1 x 128 and 128 x 128 elements, in float64."""
    (rows, inputs), outputs = small.shape, weight.shape[1]
    groups = inputs // 128
    assert small.dtype is weight.dtype is torch.float8_e4m3fn
    assert scale_a.dtype is scale_b.dtype is torch.float32
    assert small.is_contiguous()
    assert weight.t().is_contiguous()
    assert rows % 4 == outputs % 128 == groups % 4 == 0
    assert (scale_a.shape, scale_a.stride()) == ((rows, groups), (1, rows))
    assert (scale_b.shape, scale_b.stride()) == ((groups, outputs // 128), (1, groups))
    assert bias is None
    x = small.double() * scale_a.double().repeat_interleave(128, 1)
    wide = scale_b.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (x @ (weight.double() * wide)).to(out_dtype)


@pytest.mark.parametrize(("rows", "inputs", "group"), [(3, 80, 80), (1, 256, 256), (3, 256, 128), (4, 256, 128)])
def test_activations_are_rounded_by_group(rows, inputs, group):
    x = torch.randn(rows, inputs + 8, generator=torch.Generator().manual_seed(0)).bfloat16()[:, 3:-5]
    x[0, :group] = 0
    small, scales = rounded(x, group)
    padded = rows if group == inputs else -(-rows // 4) * 4
    assert small.shape == (padded, inputs)
    assert scales.shape == (padded, inputs // group)
    assert not small[rows:].float().any()
    groups = x.float().view(rows, -1, group)
    exact = groups.abs().amax(-1) / LARGEST
    exact[exact == 0] = 1
    torch.testing.assert_close(scales[:rows], exact)
    assert small[1].float().abs().max() == LARGEST if rows > 1 else not small.float().any()
    back = small[:rows].double().view(rows, -1, group) * scales[:rows].double()[..., None]
    # 3 bits of mantissa, and steps of 2**-9 at the lower end
    error = (back - groups.double()).abs()
    assert bool((error <= groups.double().abs() / 16 + exact.double()[..., None] / 2**9).all())


def product(shape, inputs, outputs, rows, *, bias, monkeypatch):
    """(the layer's result, that of float64 with exact activations) for a weight with scales of that shape."""
    tensors, weight = fp8_tensors(inputs, outputs, shape, name="weight_scale_inv", seed=0)
    monkeypatch.setattr(quire_quant.fp8, "facts_of", lambda device: HOPPER)
    stored = {f"m.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    method = FP8Method(QuantInit({}, stored, torch.device("cpu"), torch.bfloat16))
    spec = LinearSpec(inputs, outputs, bias, torch.bfloat16, name="m")
    linear = method.linear(spec, (spec,))
    assert linear.why_dequantized == []
    state = linear.finalize(tensors, torch.device("cpu"))
    assert isinstance(state, Float8Weight)
    torch.testing.assert_close(linear.dequantize(state).double(), weight, rtol=2**-8, atol=0)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    added = torch.randn(outputs, generator=torch.Generator().manual_seed(2)).bfloat16() if bias else None
    exact = x.double() @ weight.t() + (0 if added is None else added.double())
    return linear.forward(x, state, added), exact


def close(ours: Tensor, exact: Tensor):
    """Activations of 3 bits of mantissa are off by 2.6 % of their own size; sums of many by less of theirs."""
    assert ours.dtype is torch.bfloat16
    assert (ours.double() - exact).norm() <= 0.04 * exact.norm()


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("shape", [(), (1,), (48,), (48, 1)])
def test_scales_by_tensor_and_by_output(shape, rows, monkeypatch):
    close(*product(shape, 96, 48, rows, bias=rows == 17, monkeypatch=monkeypatch))


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_scales_by_block(rows, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", by_definition)
    close(*product((2, 4), 512, 256, rows, bias=rows == 6, monkeypatch=monkeypatch))


@pytest.mark.parametrize(
    ("changes", "block", "facts", "reason"),
    [
        ({}, None, None, "no NVIDIA GPU"),
        ({}, None, Facts((8, 6), (13, 0)), "8.6; 8.9 is needed"),
        ({"dtype": torch.float16}, None, HOPPER, "float16; bfloat16 is needed"),
        ({"deterministic": True}, None, HOPPER, "how many rows"),
        ({"in_features": 520}, None, HOPPER, "no multiples of 16 and 16"),
        ({"in_features": 640}, (128, 128), HOPPER, "no multiples of 128 and 512"),
        ({"out_features": 192}, (128, 128), HOPPER, "no multiples of 128 and 512"),
        ({}, (64, 64), HOPPER, "[64, 64]; they must be [128, 128]"),
        ({}, (128, 128), Facts((10, 0), (13, 0)), "10.0; scales by block need 9.0"),
        ({}, (128, 128), Facts((9, 0), (12, 8)), "CUDA 12.8"),
        ({}, (128, 128), HOPPER, None),
        ({}, None, Facts((8, 9), (12, 6)), None),
    ],
)
def test_what_has_to_be_dequantized(changes, block, facts, reason):
    values = {"in_features": 512, "out_features": 256, "bias": False, "dtype": torch.bfloat16} | changes
    reasons = why_not(LinearSpec(**values), block, facts)
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else reasons == []
