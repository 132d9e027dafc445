"""Whole checkpoints in quantized form give the logits of transformers over the dequantized weights."""

import json
import re

import pytest
import torch
from quire import LLM, ConfigError, SamplingParams
from quire.testing.tiny_models import reference_model
from quire_quant.testing import awq_tensors, gptq_tensors, quantized_checkpoint, random_layer

PROMPT = [5, 7, 11, 13, 17, 19, 23, 200, 31, 37]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}


def gptq(bits=4, group_size=32, **changes):
    def quantize(name, inputs, outputs):
        # q, k and v see the same inputs, so that their order is the same.
        seed = sum(map(ord, re.sub(r"\.[qkv]_proj|\.(gate|up)_proj", "", name)))
        layer = random_layer(inputs, outputs, bits, group_size, seed=seed, **changes)
        return gptq_tensors(layer, bits), layer.weight

    return quantize


def logprobs(folder, **options):
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=40, **options)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    return out.prompt_logprobs[1:]


def check(quantized, plain, **options):
    with torch.inference_mode():
        theirs = reference_model(plain)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    gap = max(
        abs(entry.logprob - theirs[row, token].item())
        for row, entries in enumerate(logprobs(quantized, **options))
        for token, entry in entries.items()
    )
    assert gap < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_gptq_with_activation_order(architecture, tmp_path):
    check(*quantized_checkpoint(architecture, tmp_path, gptq(act_order=True), GPTQ))


def test_gptq_settings_in_a_file_of_their_own(tmp_path):
    settings = {"bits": 8, "group_size": -1, "sym": True, "desc_act": False}
    folders = quantized_checkpoint("llama", tmp_path, gptq(8, -1, sym=True), settings, file_name="quantize_config.json")
    check(*folders)


@pytest.mark.parametrize("file_name", [None, "quant_config.json"])
def test_awq(file_name, tmp_path):
    def quantize(name, inputs, outputs):
        layer = random_layer(inputs, outputs, 4, 32, seed=len(name))
        return awq_tensors(layer), layer.weight

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    if file_name:
        settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    check(*quantized_checkpoint("qwen3", tmp_path, quantize, settings, file_name=file_name))


def test_a_mixture_of_forms_within_fused_layers(tmp_path):
    """`dynamic` gives k_proj 8 bits and leaves up_proj alone; tensors say so, and the model follows them."""
    four, eight = gptq(), gptq(8, 64)

    def quantize(name, inputs, outputs):
        if "up_proj" in name:
            return None
        return (eight if "k_proj" in name else four)(name, inputs, outputs)

    dynamic = {"-:.*up_proj": {}, "+:.*k_proj": {"bits": 8, "group_size": 64}}
    check(*quantized_checkpoint("llama", tmp_path, quantize, GPTQ | {"dynamic": dynamic}))


def test_deterministic_and_bfloat16(tmp_path):
    folder, _ = quantized_checkpoint("llama", tmp_path, gptq(), GPTQ)
    llm = LLM(str(folder), dtype="bfloat16", num_kv_blocks=60, deterministic=True)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1]]
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    assert [out.outputs[0].token_ids for out in together] == [out.outputs[0].token_ids for out in alone]


def test_an_op_set_named_by_the_user(tmp_path):
    folder, plain = quantized_checkpoint("llama", tmp_path, gptq(), GPTQ)
    check(folder, plain, ops={"quant_linear": "dequant"})
    with pytest.raises(
        ConfigError, match="no op set serves quant_linear: quant:int4pack: the compute dtype is float32"
    ):
        logprobs(folder, ops={"quant_linear": "int4pack"})


def test_a_checkpoint_of_another_method_is_named(tmp_path):
    folder, _ = quantized_checkpoint("llama", tmp_path, gptq(), GPTQ)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "exl3"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="exl3"):
        LLM(str(folder))
