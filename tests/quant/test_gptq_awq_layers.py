"""Layers in GPTQ's and AWQ's forms: the kit, every variant against its definition, refusals."""

from dataclasses import replace

import pytest
import torch
from quire import ConfigError, UnsupportedModel
from quire.plugin import LinearSpec, OpInit, QuantInit, QuantLinearSpec
from quire.testing.certify import conformance
from quire.testing.op import OpConformance
from quire.testing.quantization import reference_op
from quire_quant.awq import AWQMethod
from quire_quant.gptq import GPTQMethod
from quire_quant.kernels import DequantOps, Int4PackOps
from quire_quant.testing import awq_tensors, gemv_tensors, gptq_tensors, random_layer

CPU = torch.device("cpu")
NAME = "model.layer"


def stored_headers(tensors, name=NAME):
    return {f"{name}.{suffix}": (tuple(t.shape), t.dtype) for suffix, t in tensors.items()}


def loaded(method_class, config, tensors, inputs, outputs, dtype=torch.float64, op=reference_op):
    spec = LinearSpec(inputs, outputs, False, dtype, name=NAME)
    linear = method_class(QuantInit(config, stored_headers(tensors), CPU, dtype, op=op)).linear(spec, (spec,))
    return linear, linear.finalize(tensors, CPU)


def check(method_class, config, tensors, layer):
    """The weight is what the format says, and forward multiplies by it."""
    inputs, outputs = layer.codes.shape
    linear, state = loaded(method_class, config, tensors, inputs, outputs)
    torch.testing.assert_close(linear.dequantize(state), layer.weight, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear.forward(x, state, None), x @ layer.weight.t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "case",
    [
        {"group_size": 32, "sym": True},
        {"group_size": 32, "act_order": True},
        {"group_size": -1, "act_order": True},
        {"group_size": 24},
        {"group_size": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_gptq_variants(bits, case, v2):
    layer = random_layer(96, 32, bits, seed=bits, **case)
    config = {"quant_method": "gptq", "bits": bits, "group_size": case["group_size"], "sym": case.get("sym", False)}
    config |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    for with_g_idx in {True, "act_order" in case and case["group_size"] != -1}:
        check(GPTQMethod, config, gptq_tensors(layer, bits, v2=v2, with_g_idx=with_g_idx), layer)


def test_the_worked_gptq_example():
    zeros = torch.tensor([[8] * 8, [7, 0, 3, 15, 1, 2, 5, 9]])
    codes = (torch.arange(8)[:, None] + 2 * torch.arange(8)) % 16
    layer = random_layer(8, 8, 4, 4)
    layer = replace(layer, codes=codes, zeros=zeros, scales=torch.tensor([[0.5] * 8, [0.25] * 8]).half())
    tensors = gptq_tensors(layer, 4)
    assert hex(tensors["qzeros"][1].item() & 0xFFFFFFFF) == "0x8410e2f6"
    config = {"bits": 4, "group_size": 4, "sym": False}
    linear, state = loaded(GPTQMethod, config, tensors, 8, 8)
    assert linear.dequantize(state)[1].tolist() == [-3, -2.5, -2, -1.5, 1.5, 1.75, 2, 2.25]
    tensors["g_idx"] = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.int32)
    linear, state = loaded(GPTQMethod, config, tensors, 8, 8)
    assert linear.dequantize(state)[1].tolist() == [0.5, -2.5, 1, -1.5, -1, 1.75, 2, 0.5]
    assert state[0].perm.tolist() == [1, 3, 4, 7, 0, 2, 5, 6]


@pytest.mark.parametrize("v2", [False, True])
def test_a_symmetric_header_is_believed_whatever_form_the_zeros_have(v2):
    layer = random_layer(64, 32, 4, 32, sym=True)
    check(GPTQMethod, {"bits": 4, "group_size": 32, "sym": True}, gptq_tensors(layer, 4, v2=v2), layer)


def test_a_symmetric_header_over_asymmetric_zeros_is_not_believed(caplog):
    layer = random_layer(64, 32, 4, 32)
    check(GPTQMethod, {"bits": 4, "group_size": 32, "sym": True}, gptq_tensors(layer, 4), layer)
    assert "not all equal although sym is true" in caplog.text


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),
        ({"meta": {"quantizer": ["autogptq:0.7"]}}, True),
        ({"meta": {"quantizer": ["gptqmodel:7.7"]}}, False),
        ({"checkpoint_format": "gptq_v2"}, False),
        ({"sym": True}, False),
    ],
)
def test_zero_points_that_old_tools_may_have_spoiled_are_told(changes, warned, caplog):
    GPTQMethod(QuantInit({"bits": 4, "group_size": 32, "sym": False} | changes, {}, CPU, torch.float32))
    assert ("spoiled" in caplog.text and "take a checkpoint in the form gptq_v2" in caplog.text) == warned


@pytest.mark.parametrize("size", [128, 64, 32, -1])
def test_awq_layouts(size):
    layer = random_layer(256, 32, 4, size)
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    check(AWQMethod, config, awq_tensors(layer), layer)
    check(AWQMethod, config | {"version": "gemv"}, gemv_tensors(layer, 256 if size == -1 else size), layer)
    older = {"w_bit": 4, "q_group_size": size, "zero_point": True, "version": "GEMM"}
    check(AWQMethod, older, awq_tensors(layer), layer)


def test_awq_without_zero_points():
    layer = random_layer(64, 32, 4, 32, sym=True)
    tensors = {name: t for name, t in awq_tensors(layer).items() if name != "qzeros"}
    check(AWQMethod, {"bits": 4, "group_size": 32, "zero_point": False}, tensors, layer)


TestGPTQ = conformance("quantization", "gptq")
TestAWQ = conformance("quantization", "awq")


class TestGPTQByDequantization(TestGPTQ):
    op = staticmethod(DequantOps(OpInit(CPU, 256)).build)


@pytest.mark.parametrize("ops", [Int4PackOps, DequantOps])
def test_op_sets_agree_on_any_input(ops):
    """Slices, act-order, groups that the operation does not know, 2 and 3 bits."""
    for bits, size, act_order in ((4, 96, True), (3, 32, False), (2, -1, False), (4, 64, True)):
        layer = random_layer(192, 48 if bits == 4 else 64, bits, size, act_order=act_order)
        config = {"bits": bits, "group_size": size, "sym": False}
        tensors = gptq_tensors(layer, bits)
        outputs = layer.codes.shape[1]
        op = ops(OpInit(CPU, 256)).build
        linear, state = loaded(GPTQMethod, config, tensors, 192, outputs, torch.bfloat16, op)
        wide = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
        for rows in (0, 1, 5):
            x = wide[:rows, 3:195]
            exact = x.double() @ layer.weight.t()
            assert (linear.forward(x, state, None).double() - exact).norm() <= 5e-3 * exact.norm()


def test_sources_that_order_their_inputs_differently_are_held_apart():
    parts = [random_layer(64, size, 4, 32, act_order=True, seed=size) for size in (64, 32)]
    specs = tuple(LinearSpec(64, p.codes.shape[1], True, torch.float64, name=f"m.{i}") for i, p in enumerate(parts))
    each = [gptq_tensors(part, 4) for part in parts]
    headers = {k: v for i, t in enumerate(each) for k, v in stored_headers(t, f"m.{i}").items()}
    method = GPTQMethod(
        QuantInit({"bits": 4, "group_size": 32, "sym": False}, headers, CPU, torch.float64, op=reference_op)
    )
    linear = method.linear(replace(specs[0], out_features=96, name="m"), specs)
    joined = {t.name: torch.cat([tensors[t.name] for tensors in each], t.out_dim) for t in linear.tensors()}
    state = linear.finalize(joined, CPU)
    weight = torch.cat([part.weight for part in parts])
    torch.testing.assert_close(linear.dequantize(state), weight, rtol=1e-6, atol=1e-7)
    x, bias = torch.randn(3, 64, dtype=torch.float64), torch.randn(96, dtype=torch.float64)
    torch.testing.assert_close(linear.forward(x, state, bias), x @ weight.t() + bias, rtol=1e-5, atol=1e-6)


GOOD = {"bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    ("method_class", "config", "words"),
    [
        (GPTQMethod, GOOD | {"bits": 5}, "GPTQ bits is 5.*2, 3, 4 or 8"),
        (GPTQMethod, GOOD | {"checkpoint_format": "marlin"}, "'marlin' is a kernel's layout.*compressed-tensors"),
        (GPTQMethod, GOOD | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQMethod, GOOD | {"bits": 8}, r"qweight has shape \[8, 32\].*make it \[16, 32\]"),
        (GPTQMethod, GOOD | {"group_size": 64}, r"qzeros has shape \[2, 4\].*make it \[1, 4\]"),
        (AWQMethod, GOOD | {"version": "gemv_fast"}, "'gemv_fast' is not supported; read are gemm, gemv"),
        (AWQMethod, GOOD | {"bits": 3}, "AWQ bits is 3"),
        (AWQMethod, GOOD | {"group_size": 0}, "AWQ group_size is 0"),
        (AWQMethod, GOOD | {"group_size": 48}, "64 inputs in groups of 48"),
    ],
)
def test_refusals(method_class, config, words):
    tensors = gptq_tensors(random_layer(64, 32, 4, 32, sym=True), 4)
    with pytest.raises(UnsupportedModel, match=words):
        loaded(method_class, config, tensors, 64, 32)


def test_refusals_that_need_the_tensors():
    tensors = gptq_tensors(random_layer(64, 32, 4, 32), 4)
    tensors["g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(UnsupportedModel, match="g_idx does not make groups of 32"):
        loaded(GPTQMethod, GOOD, tensors, 64, 32)
    for value in (0.0, 1.0):
        biased = gptq_tensors(random_layer(64, 32, 4, 32), 4) | {"bias": torch.full((32,), value).half()}
        if value:
            with pytest.raises(UnsupportedModel, match="bias that the architecture does not know"):
                loaded(GPTQMethod, GOOD, biased, 64, 32)
        else:
            loaded(GPTQMethod, GOOD, biased, 64, 32)
    with pytest.raises(UnsupportedModel, match=r"all experts of a layer.*one by one.*take a checkpoint with"):
        GPTQMethod(QuantInit(GOOD, {"model.mlp.experts.gate_up_proj.qweight": ((), torch.int32)}, CPU, torch.float32))


class TestInt4PackOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return Int4PackOps(self.init())


class TestDequantOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return DequantOps(self.init())


def test_reasons_of_int4pack():
    spec = QuantLinearSpec(64, 40, 8, 24, "middle", torch.float32)
    reasons = " ".join(Int4PackOps(OpInit(torch.device("meta"), 16)).why_not(spec))
    for part in ("not meta", "8 bits", "float32", "40 outputs", "groups of 24"):
        assert part in reasons


def test_without_op_sets_the_error_says_so():
    tensors = gptq_tensors(random_layer(64, 32, 4, 32), 4)
    with pytest.raises(ConfigError, match="no op set serves quant_linear"):
        loaded(GPTQMethod, GOOD, tensors, 64, 32, op=QuantInit({}, {}, CPU, torch.float32).op)
