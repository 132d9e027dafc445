"""Packing, bit for bit and both ways, against the public libraries that write these formats.

They are not in the test extra, as they pull in the tools of training; install them without what they depend on, and
what they then ask for: `pip install --no-deps gptqmodel` and `compressed-tensors`.
"""

import warnings

import pytest
import torch
from quire_quant.bits import pack, unpack
from quire_quant.solve import Solution, Target
from quire_quant.store import read, stored
from quire_quant.testing import awq_tensors, compressed_tensors, gemv_tensors, gptq_tensors, random_layer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")
INPUTS, OUTPUTS, GROUP = 128, 64, 32


@pytest.fixture(scope="module")
def gptqmodel():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip(
            "gptqmodel", reason="pip install --no-deps gptqmodel, and what its import asks for", exc_type=ImportError
        )


def dense(layer):
    """An unquantized layer with the weight that codes mean."""
    linear = nn.Linear(*layer.codes.shape, bias=False)
    linear.weight.data = layer.weight.float()
    return linear


def made(kind, bits, sym):
    return kind(
        bits=bits, group_size=GROUP, sym=sym, desc_act=False, in_features=INPUTS, out_features=OUTPUTS, bias=False
    )


def filled(theirs, tensors):
    for name, tensor in tensors.items():
        getattr(theirs, name).data = tensor.clone()
    return theirs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", [{"sym": True}, {}, {"act_order": True}], ids=str)
def test_gptq_is_packed_as_gptqmodel_packs(gptqmodel, bits, case):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = random_layer(INPUTS, OUTPUTS, bits, GROUP, seed=bits, **case)
    theirs = made(TorchLinear, bits, case.get("sym", False))
    theirs.pack_original(dense(layer), layer.scales.t().float(), layer.zeros.t().float(), layer.g_idx.int())
    ours = gptq_tensors(layer, bits, v2=True)  # the first form is made of the second when it is saved
    for name, tensor in ours.items():
        assert torch.equal(getattr(theirs, name), tensor), name
    if not case.get("act_order"):
        target = Target(bits, GROUP, sym=False)
        solution = Solution(target, layer.codes.t().to(torch.uint8), layer.scales.t(), layer.zeros.t().to(torch.uint8))
        written = stored("gptq", solution)
        for name in ours:
            assert torch.equal(written[name], getattr(theirs, name)), name
        assert torch.equal(read("gptq", {name: getattr(theirs, name) for name in ours}, target).codes, solution.codes)
    back = filled(made(TorchLinear, bits, case.get("sym", False)), ours)
    torch.testing.assert_close(back.dequantize_weight().double().t(), layer.weight, rtol=2e-3, atol=1e-4)


def test_awq_is_packed_as_gptqmodel_packs(gptqmodel):
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = random_layer(INPUTS, OUTPUTS, 4, GROUP)
    for kind, ours in ((AwqGEMMLinear, awq_tensors(layer)), (AwqGEMVLinear, gemv_tensors(layer, GROUP))):
        theirs = made(AwqTorchLinear, 4, False)  # the others are made where there is a GPU only, and pack anywhere
        kind.pack(theirs, dense(layer), layer.scales.t(), layer.zeros.t().half())
        for name, tensor in ours.items():
            assert torch.equal(getattr(theirs, name), tensor), (kind, name)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_codes_are_packed_as_compressed_tensors_packs(bits):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="pip install --no-deps compressed-tensors loguru",
        exc_type=ImportError,
    )
    codes = torch.arange(32 * 64).view(32, 64) % (1 << bits)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    for dim, ours in ((1, pack(codes.t(), bits).t()), (0, pack(codes, bits))):
        theirs = helpers.pack_to_int32(signed, bits, packed_dim=dim)
        assert torch.equal(theirs, ours)
        back = unpack(theirs.t().contiguous() if dim else theirs, bits, codes.shape[dim])
        assert torch.equal((back.t() if dim else back).long(), codes)
        assert torch.equal(helpers.unpack_from_int32(ours.contiguous(), bits, signed.shape, packed_dim=dim), signed)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_layers_with_zero_points_mean_what_compressed_tensors_makes_of_them(bits):
    base = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.base",
        reason="pip install --no-deps compressed-tensors loguru",
        exc_type=ImportError,
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    layer = random_layer(128, 96, bits, 32, seed=bits)
    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = base.PackedQuantizationCompressor.decompress(compressed_tensors(layer, bits), scheme)["weight"]
    torch.testing.assert_close(theirs.double(), layer.weight, atol=1e-4, rtol=0)  # theirs is rounded to float16
