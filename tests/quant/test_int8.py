"""The int8 method passes the kit, keeps its error bound, and runs end to end."""

import pytest
import torch
from quire import LLM, ConfigError, SamplingParams
from quire.plugin import LinearSpec, QuantInit
from quire.testing.quantization import QuantizationConformance
from quire.testing.tiny_models import make_checkpoint
from quire_quant.int8 import Int8Method, Int8Options

INIT = QuantInit({}, {}, torch.device("cpu"), torch.float32, Int8Options(group_size=32))


class TestInt8(QuantizationConformance):
    @pytest.fixture
    def method_class(self):
        return Int8Method


def test_the_error_is_at_most_half_a_step():
    linear = Int8Method(INIT).linear(spec := LinearSpec(64, 10, False, torch.float32, name="a.b"), (spec,))
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    state = linear.finalize({"weight": weight}, torch.device("cpu"))
    step = weight.view(10, 2, 32).abs().amax(-1, keepdim=True) / 127
    error = (linear.dequantize(state) - weight).view(10, 2, 32).abs()
    assert (error <= step / 2 + 1e-7).all()
    assert state.codes.dtype is torch.int8


@pytest.mark.parametrize(
    ("name", "inputs"), [("lm_head", 64), ("model.layers.0.mlp.gate", 64), ("model.layers.0.mlp.down_proj", 48)]
)
def test_layers_that_stay_as_they_are(name, inputs):
    spec = LinearSpec(inputs, 10, False, torch.float32, name=name)
    assert Int8Method(INIT).linear(spec, (spec,)) is None


def test_end_to_end(tmp_path):
    folder = make_checkpoint("llama", tmp_path / "model")
    options = {"dtype": "float32", "num_kv_blocks": 40}
    quantized = LLM(str(folder), quantization="int8", plugin_options={"int8": {"group_size": 32}}, **options)
    assert quantized.engine.parts.config.quantization.provider.name == "int8"
    prompt = list(range(5, 45))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    (ours,) = quantized.generate([prompt], params, use_tqdm=False)
    (exact,) = LLM(str(folder), **options).generate([prompt], params, use_tqdm=False)
    gaps = [
        abs(a[token].logprob - b[token].logprob)
        for token, a, b in zip(prompt[1:], ours.prompt_logprobs[1:], exact.prompt_logprobs[1:], strict=True)
    ]
    assert 0 < sum(gaps) / len(gaps) < 0.1


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    import json

    folder = make_checkpoint("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3"}}))
    with pytest.raises(ConfigError, match="exl3"):
        LLM(str(folder), quantization="int8")
    with pytest.raises(ConfigError, match="exl3"):
        LLM(str(folder))
