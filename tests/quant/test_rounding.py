"""int8 and int4 pass the kit, keep their error bounds, and run end to end."""

from dataclasses import replace

import pytest
import torch
from quire import LLM, ConfigError, SamplingParams
from quire.plugin import LinearSpec, OpInit, QuantInit
from quire.testing.quantization import QuantizationConformance, reference_op
from quire.testing.tiny_models import make_checkpoint
from quire_quant import rounding
from quire_quant.codes import Form
from quire_quant.kernels import DequantOps
from quire_quant.rounding import Int4Method, Int4Options, Int8Method, Int8Options, rounded

INIT = QuantInit({}, {}, torch.device("cpu"), torch.float32, Int8Options(group_size=32), op=reference_op)


class TestInt8(QuantizationConformance):
    @pytest.fixture
    def method_class(self):
        return Int8Method


class TestInt4(QuantizationConformance):
    @pytest.fixture
    def method_class(self):
        return Int4Method


@pytest.mark.parametrize(
    ("method", "name", "half"), [(Int8Method, "a.b", 128), (Int4Method, "a.b", 8), (Int4Method, "lm_head", 32)]
)
def test_the_error_is_at_most_half_a_step_and_a_step_at_the_far_end(method, name, half):
    options = method.options(group_size=32)
    spec = LinearSpec(64, 10, False, torch.float32, name=name)
    linear = method(replace(INIT, options=options)).linear(spec, (spec,))
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    state = linear.finalize({"weight": weight}, torch.device("cpu"))
    groups, found = (each.view(10, 2, 32) for each in (weight, linear.dequantize(state)))
    outermost = groups.abs().argmax(-1, keepdim=True)
    step = (groups.gather(-1, outermost) / -half).half().float()
    far = groups / step > half - 0.5
    assert ((found - groups).abs() <= step.abs() * torch.where(far, 1.001, 0.501) + 1e-7).all()
    assert (found[3] == 0).all()


@pytest.mark.parametrize(
    ("name", "inputs"), [("lm_head", 48), ("model.layers.0.mlp.gate", 64), ("model.layers.0.mlp.down_proj", 48)]
)
def test_layers_that_stay_as_they_are(name, inputs):
    spec = LinearSpec(inputs, 10, False, torch.float32, name=name)
    assert Int8Method(INIT).linear(spec, (spec,)) is None


@pytest.mark.parametrize(("method", "options", "bits"), [(Int8Method, Int8Options, 8), (Int4Method, Int4Options, 6)])
def test_the_head_has_bits_of_its_own_or_is_left_alone(method, options, bits):
    spec = LinearSpec(128, 10, False, torch.float32, name="lm_head")
    for given, found in ((None, bits), (options(head_bits=6), 6), (options(head_bits=8), 8)):
        assert method(replace(INIT, options=given)).linear(spec, (spec,)).operation().bits == found
    assert method(replace(INIT, options=options(head_bits=16))).linear(spec, (spec,)) is None
    slow = replace(INIT, op=DequantOps(OpInit(torch.device("cpu"), 64)).build)
    assert method(slow).linear(spec, (spec,)) is None


@pytest.mark.parametrize(("method", "options", "bits"), [(Int8Method, Int8Options, 16), (Int4Method, Int4Options, 8)])
def test_inputs_may_have_8_bits_by_option_and_where_weights_have_4(method, options, bits):
    spec = LinearSpec(128, 10, False, torch.bfloat16, name="a.b")
    for given, allowed in ((None, bits), (options(input_bits=8), 8), (options(input_bits=16), 16)):
        layer = method(replace(INIT, options=given)).linear(spec, (spec,))
        assert layer.operation().input_bits == allowed


def test_rounding_in_pieces_leaves_the_weight_and_every_row_as_it_is(monkeypatch):
    weight = torch.randn(7, 64)
    whole, before = rounded(weight, Form(4, 32)), weight.clone()
    monkeypatch.setattr(rounding, "PIECE", 128)
    pieces = rounded(weight, Form(4, 32))
    assert torch.equal(weight, before)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (6, 0.2)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_rounded_head_changes_little_tied_or_not(tmp_path, family, bits, most):
    folder = make_checkpoint(family, tmp_path / "model")
    model, prompt = {}, list(range(5, 45))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    for head in (bits, 16):
        llm = LLM(
            str(folder),
            dtype="float32",
            num_kv_blocks=40,
            quantization="int8",
            plugin_options={"int8": {"group_size": 32, "head_bits": head}},
        )
        (model[head],) = llm.generate([prompt], params, use_tqdm=False)
    gaps = [
        abs(a[token].logprob - b[token].logprob)
        for token, a, b in zip(prompt[1:], model[bits].prompt_logprobs[1:], model[16].prompt_logprobs[1:], strict=True)
    ]
    assert 0 < max(gaps) < most


@pytest.mark.parametrize(("name", "error"), [("int8", 0.1), ("int4", 0.5)])
def test_end_to_end(tmp_path, name, error):
    folder = make_checkpoint("llama", tmp_path / "model")
    options = {"dtype": "float32", "num_kv_blocks": 40}
    quantized = LLM(str(folder), quantization=name, plugin_options={name: {"group_size": 32}}, **options)
    assert quantized.engine.parts.config.quantization.provider.name == name
    prompt = list(range(5, 45))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    (ours,) = quantized.generate([prompt], params, use_tqdm=False)
    (exact,) = LLM(str(folder), **options).generate([prompt], params, use_tqdm=False)
    gaps = [
        abs(a[token].logprob - b[token].logprob)
        for token, a, b in zip(prompt[1:], ours.prompt_logprobs[1:], exact.prompt_logprobs[1:], strict=True)
    ]
    assert 0 < sum(gaps) / len(gaps) < error


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    import json

    folder = make_checkpoint("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3"}}))
    with pytest.raises(ConfigError, match="exl3"):
        LLM(str(folder), quantization="int8")
    with pytest.raises(ConfigError, match="exl3"):
        LLM(str(folder))
