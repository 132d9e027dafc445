"""Experts in quantized form: whole checkpoints against transformers, experts quantized at load, what is refused."""

import json
import shutil

import pytest
import torch
from quire import LLM, SamplingParams, UnsupportedModel
from quire.cli.app import app
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_quant.testing import (
    awq_tensors,
    compressed_tensors,
    fp8_tensors,
    gptq_tensors,
    quantized_checkpoint,
    random_layer,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

PROMPT = [5, 7, 11, 13, 17, 19, 23, 200, 31, 37]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
PACKED |= {"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}}}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def layer(name, inputs, outputs, **options):
    return random_layer(inputs, outputs, 4, 16, seed=sum(map(ord, name)), **options)


def gptq(name, inputs, outputs):
    made = layer(name, inputs, outputs, act_order=True)
    return gptq_tensors(made, 4), made.weight


def awq(name, inputs, outputs):
    made = layer(name, inputs, outputs)
    return awq_tensors(made), made.weight


def packed(name, inputs, outputs):
    made = layer(name, inputs, outputs)
    return compressed_tensors(made, 4), made.weight


def fp8(name, inputs, outputs):
    shape = (-(-outputs // 16), -(-inputs // 16))
    return fp8_tensors(inputs, outputs, shape, block=16, name="weight_scale_inv", seed=sum(map(ord, name)))


def logprobs(folder, **options):
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=40, **options)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    return [{token: entry.logprob for token, entry in row.items()} for row in out.prompt_logprobs[1:]]


def stacked(folder, target):
    """The checkpoint as transformers stores it in its own format, all experts of a layer in one tensor."""
    shutil.copytree(folder, target)
    reference_model(folder).save_pretrained(target / "new", save_original_format=False)
    shutil.move(target / "new" / "model.safetensors", target / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(target / "model.safetensors"))
    return target


def check(quantized, plain):
    with torch.inference_mode():
        theirs = reference_model(plain)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for row, entries in enumerate(logprobs(quantized)):
        assert all(abs(value - theirs[row, token].item()) < 1e-3 for token, value in entries.items())


@pytest.mark.parametrize(
    ("architecture", "quantize", "settings"),
    [
        ("qwen3_moe", gptq, GPTQ),
        ("qwen3_moe", awq, AWQ),
        ("mixtral", packed, PACKED),
        ("mixtral", fp8, FP8),
    ],
)
def test_experts_of_checkpoints(architecture, quantize, settings, tmp_path):
    made = []

    def watched(name, inputs, outputs):
        made.append(name)
        return quantize(name, inputs, outputs)

    check(*quantized_checkpoint(architecture, tmp_path, watched, settings))
    assert sum(".experts." in name for name in made) == 2 * 4 * 3


def test_some_experts_and_some_of_their_matrices_are_left_unquantized(tmp_path):
    def quantize(name, inputs, outputs):
        return None if ".experts.1." in name or "experts.2.up_proj" in name else gptq(name, inputs, outputs)

    check(*quantized_checkpoint("qwen3_moe", tmp_path, quantize, GPTQ))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_are_rounded_at_load_whether_they_are_stored_apart_or_stacked(architecture, tmp_path):
    folder = make_checkpoint(architecture, tmp_path / "apart")
    options = {"quantization": "int8", "plugin_options": {"int8": {"group_size": 16}}}
    apart = logprobs(folder, **options)
    assert apart == logprobs(stacked(folder, tmp_path / "stacked"), **options)
    exact = logprobs(folder)
    gaps = [abs(row[token] - exact[i][token]) for i, row in enumerate(apart) for token in row.keys() & exact[i].keys()]
    assert 0 < sum(gaps) / len(gaps) < 0.1
    command = ["plugins", "explain", "quantization", "-m", str(folder), "--json"]
    (tmp_path / "c.yaml").write_text("model: {quantization: int8}\nplugins: {options: {int8: {group_size: 16}}}\n")
    answer = CliRunner().invoke(app, ["-c", str(tmp_path / "c.yaml"), *command])
    forms = {row["layers"]: row for row in json.loads(answer.stdout)["layers"]}
    (experts,) = [row for name, row in forms.items() if "experts" in name and name.endswith(("down_proj", "w2"))]
    assert (experts["count"], experts["form"]) == (8, "8 bits in groups of 16, zeros: middle")


def test_a_stack_that_lacks_is_missed(tmp_path):
    file = stacked(make_checkpoint("qwen3_moe", tmp_path / "apart"), tmp_path / "stacked") / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1.mlp.experts.down" not in n}, file)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\."):
        logprobs(tmp_path / "stacked", quantization="int8")


def test_a_batch_changes_nothing_in_the_deterministic_form(tmp_path):
    folder, _ = quantized_checkpoint("qwen3_moe", tmp_path, gptq, GPTQ)
    llm = LLM(str(folder), dtype="bfloat16", num_kv_blocks=60, deterministic=True)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1]]
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    assert [out.outputs[0].token_ids for out in together] == [out.outputs[0].token_ids for out in alone]
