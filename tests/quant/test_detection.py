"""What a checkpoint says of itself: how its method is found, what is quantized, what is fused, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quire import LLM, SamplingParams, UnsupportedModel
from quire.plugin import LinearSpec, QuantInit
from quire.testing.quantization import reference_op
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_quant.awq import AWQMethod
from quire_quant.compressed import CompressedTensorsMethod
from quire_quant.fp8 import FP8Method
from quire_quant.gptq import GPTQMethod
from quire_quant.testing import (
    awq_tensors,
    compressed_tensors,
    fp8_tensors,
    gptq_tensors,
    quantized_checkpoint,
    random_layer,
)
from safetensors.torch import save_file

CPU = torch.device("cpu")
PROMPT = [5, 7, 11, 13, 17, 19, 23, 200, 31, 37]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


def gptq(name, inputs, outputs):
    layer = random_layer(inputs, outputs, 4, 32, sym=True, seed=len(name))
    return gptq_tensors(layer, 4), layer.weight


def load(folder, settings):
    make_checkpoint("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    LLM(str(folder), num_kv_blocks=40)


def agrees(folders):
    quantized, plain = folders
    with torch.inference_mode():
        theirs = reference_model(plain)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    llm = LLM(str(quantized), dtype="float32", num_kv_blocks=40)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    for row, entries in enumerate(out.prompt_logprobs[1:]):
        assert all(abs(entry.logprob - theirs[row, token].item()) < 1e-3 for token, entry in entries.items())
    return llm.engine.parts.config


@pytest.mark.parametrize(
    ("settings", "provider"),
    [
        (GPTQ, "gptq"),
        ({"method": "gptq"} | {key: value for key, value in GPTQ.items() if key != "quant_method"}, "gptq"),
        (GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "gptq"),
        (GPTQ | {"lm_head": True, "modules_in_block_to_quantize": [["mlp.down_proj"]]}, "gptq"),
    ],
)
def test_the_method_is_the_one_that_the_settings_name_and_tensors_say_what_is_quantized(settings, provider, tmp_path):
    """Here the output head is quantized too, whatever the settings say."""
    made = []

    def quantize(name, inputs, outputs):
        made.append(name)
        return gptq(name, inputs, outputs)

    config = agrees(quantized_checkpoint("llama", tmp_path, quantize, settings))
    assert "lm_head" in made
    assert config.quantization.provider.name == provider


@pytest.mark.parametrize(
    ("stored", "words"),
    [("qweight", "g_idx is int32.*no quantization_config.*quantize_config.json"), ("fp8", "weight is float8_e4m3fn")],
)
@pytest.mark.parametrize("option", [None, "int8"])
def test_codes_without_settings(stored, words, option, tmp_path):
    def quantize(name, inputs, outputs):
        if stored == "fp8":
            return fp8_tensors(inputs, outputs, (), seed=0)
        return gptq(name, inputs, outputs)

    folder, _ = quantized_checkpoint("llama", tmp_path, quantize, {})
    if stored == "qweight":
        words = words.replace("g_idx is int32", "qweight is int32")
    with pytest.raises(UnsupportedModel, match=words):
        LLM(str(folder), quantization=option, num_kv_blocks=40)


@pytest.mark.parametrize(
    "method", ["marlin", "bitblas", "qqq", "exl3", "exl2", "bitsandbytes", "hqq", "aqlm", "modelopt", "mxfp4", "quark"]
)
def test_methods_that_nobody_reads_are_named_with_what_is_read(method, tmp_path):
    words = f"quantized by '{method}', which no plugin reads; read are auto-round, awq, compressed-tensors, fp8, gptq"
    with pytest.raises(UnsupportedModel, match=words) as caught:
        load(tmp_path, {"quant_method": method})
    assert "`quire quantize`" in caught.value.remedy


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ format 'marlin' is a kernel's layout, not a portable format"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ format 'marlin' is a kernel's layout"),
        (GPTQ | {"format": "bitblas", "checkpoint_format": "gptq"}, "'bitblas' is a kernel's layout"),
        (GPTQ | {"format": "gptq_p"}, "'gptq_p' stores the bits of its codes in planes"),
        (GPTQ | {"format": "qqq"}, "'qqq' is made for activations of 8 bits"),
        (GPTQ | {"format": "exl3"}, "'exl3' codes weights by a trellis"),
        (GPTQ | {"format": "new"}, "'new' is not known; read are gptq and gptq_v2"),
        (
            GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            "'auto_round:auto_awq' is not",
        ),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv_fast"},
            "'gemv_fast' is not supported; read are gemm, gemv",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "llm-awq"}, "'llm-awq' is not supported; read are gemm, gemv"),
        ({"quant_method": "awq", "bits": 4, "format": "marlin"}, "'marlin' is not supported; read are gemm, gemv"),
        *(
            (COMPRESSED | {"format": form}, f"format '{form}' is not supported; read are pack-quantized")
            for form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "int-quantized", "marlin-24")
        ),
    ],
)
def test_forms_that_are_refused_by_name_with_the_mend(settings, words, tmp_path):
    with pytest.raises(UnsupportedModel, match=words) as caught:
        load(tmp_path, settings)
    assert "export the model" in caught.value.remedy


def test_the_first_matching_rule_counts_and_names_of_layers_are_matched_from_their_start():
    rules = {"-:.*k_proj": {}, "+:.*v_proj": {"bits": 8}, r".*\.1\..*": {"group_size": 64}, ".*v_proj": {"bits": 2}}
    method = GPTQMethod(QuantInit(GPTQ | {"dynamic": rules}, {}, CPU, torch.float32))
    found = {name: method.settings(name) for name in ("m.1.v_proj", "m.0.q_proj", "m.1.q_proj", "m.1.k_proj", "v_proj")}
    assert [(s.bits, s.group_size) for s in found.values()] == [(8, 32), (4, 32), (4, 64), (4, 64), (8, 32)]
    extra = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    extra["extra_config"] = {"m.0.q_proj": {"bits": 8}, "lm_head": {"bits": 16}}
    method = GPTQMethod(QuantInit(GPTQ | extra, {}, CPU, torch.float32))
    assert [method.settings(f"m.{i}.q_proj").bits for i in (0, 1)] == [8, 4]


def test_awq_zero_points_that_are_stored_count_whatever_the_settings_say():
    """GPTQModel writes them for symmetric weights too, with `zero_point` false."""
    layer = random_layer(64, 32, 4, 32)
    tensors, spec = awq_tensors(layer), LinearSpec(64, 32, False, torch.float64, name="m")
    headers = {f"m.{name}": (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    settings = {"bits": 4, "group_size": 32, "zero_point": False}
    linear = AWQMethod(QuantInit(settings, headers, CPU, torch.float64, op=reference_op)).linear(spec, (spec,))
    torch.testing.assert_close(linear.dequantize(linear.finalize(tensors, CPU)), layer.weight, rtol=1e-6, atol=1e-7)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
PACKED = COMPRESSED | {"config_groups": {"a": {"targets": ["Linear"], "weights": INT4}}}
QKV = {"q": 64, "k": 32, "v": 32}


def qkv(make):
    """(headers, specs) of three layers of one input, each made by `make(name, outputs)`."""
    stored = {
        f"{name}.{suffix}": (tuple(tensor.shape), tensor.dtype)
        for name, outputs in QKV.items()
        for suffix, tensor in make(name, outputs).items()
    }
    return stored, tuple(LinearSpec(64, outputs, False, torch.float32, name=name) for name, outputs in QKV.items())


@pytest.mark.parametrize(
    ("method_class", "settings", "make", "odd"),
    [
        (GPTQMethod, GPTQ, lambda n: gptq_tensors(random_layer(64, n, 4, 32), 4), {}),
        (AWQMethod, GPTQ, lambda n: awq_tensors(random_layer(64, n, 4, 32)), {}),
        (CompressedTensorsMethod, PACKED, lambda n: compressed_tensors(random_layer(64, n, 4, 32), 4), {}),
        *(
            (FP8Method, {}, lambda n, s=s: fp8_tensors(64, n, s(n), seed=0)[0], None)
            for s in (lambda n: (), lambda n: (n, 1))
        ),
    ],
)
def test_layers_of_one_input_are_fused_where_their_forms_agree(method_class, settings, make, odd, caplog):
    stored, specs = qkv(lambda name, outputs: make(outputs))
    assert method_class(QuantInit(settings, stored, CPU, torch.float32)).may_fuse(specs)
    stored, specs = qkv(lambda name, outputs: {} if name == "k" else make(outputs))
    assert not method_class(QuantInit(settings, stored, CPU, torch.float32)).may_fuse(specs)
    if odd is not None:
        assert "q and where else it is so: not fused, as forms differ" in caplog.text
        assert "k: unquantized" in caplog.text


def test_layers_of_other_bits_are_not_fused_and_the_reason_is_told_once(caplog):
    stored, specs = qkv(lambda name, outputs: gptq_tensors(random_layer(64, outputs, 4, 32), 4))
    method = GPTQMethod(QuantInit(GPTQ | {"dynamic": {"k$": {"bits": 8}}}, stored, CPU, torch.float32))
    assert not method.may_fuse(specs)
    assert not method.may_fuse(specs)
    assert "k: bits=8 group_size=32 sym=True" in caplog.text
    assert len(caplog.records) == 1


def test_scales_of_whole_tensors_keep_their_rows_when_fused():
    """No row is rounded anew to a scale that is shared."""
    made = {name: fp8_tensors(64, outputs, (), seed=outputs + len(name)) for name, outputs in QKV.items()}
    for scale in ((), (1,), (1, 1)):
        tensors = {name: t | {"weight_scale": t["weight_scale"].view(scale)} for name, (t, _) in made.items()}
        stored, specs = qkv(lambda name, outputs, tensors=tensors: tensors[name] | {"input_scale": torch.ones(())})
        method = FP8Method(QuantInit({}, stored, CPU, torch.float64, op=reference_op))
        assert method.may_fuse(specs)
        linear = method.linear(LinearSpec(64, 128, False, torch.float64, name="qkv"), specs)
        joined = {
            "weight": torch.cat([t["weight"] for t in tensors.values()]),
            "weight_scale": (torch.cat if scale else torch.stack)([t["weight_scale"] for t in tensors.values()]),
            "input_scale": torch.ones(3),
        }
        weight = linear.dequantize(linear.finalize(joined, CPU))
        torch.testing.assert_close(weight, torch.cat([w for _, w in made.values()]), rtol=1e-6, atol=1e-7)


MEMORY = """
import sys
import quire.loader.files
from quire.config import configure
from quire.engine.build import build_model, host_for
from quire.loader.checkpoint import resolve_checkpoint
from quire.loader.progress import Silent
from quire.resolve import resolve

quire.loader.files.MAPPED_BYTES = 1 << 20  # what is mapped counts as memory

def used(field):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024

def load(folder):
    configured = configure({"model": folder, "dtype": "bfloat16"})
    host = host_for(configured.config)
    return build_model(resolve(configured, host, resolve_checkpoint(folder)), host, Silent())

load(sys.argv[1])  # whatever a first load brings in
before = used("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
model = load(sys.argv[2])
print(used("VmRSS") - before, used("VmHWM") - before)
"""


def wide_checkpoint(folder, layers):
    """A random GPTQ checkpoint of a Llama of 1,024 inputs."""
    make_checkpoint("llama-linear", folder)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "head_dim": 256}
    config = json.loads((folder / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ | {"group_size": 128}}))
    shapes = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (1024, 1024))
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, 512)) | {"mlp.down_proj": (2816, 1024)}
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (1024, 2816))
    tensors = {name: torch.randn(320, 1024) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = torch.ones(1024)
    for index in range(layers):
        stem = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{norm}.weight"] = torch.ones(1024)
        for name, (inputs, outputs) in shapes.items():
            tensors[f"{stem}{name}.qweight"] = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), dtype=torch.int32)
            tensors[f"{stem}{name}.qzeros"] = torch.full((inputs // 128, outputs // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{stem}{name}.scales"] = torch.rand(inputs // 128, outputs).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(inputs * outputs for inputs, outputs in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of a process's memory")
def test_memory_is_the_model_and_one_layer_at_its_peak(tmp_path):
    """What is held is the packed form alone; above it, while loading, are at most 5 bytes per weight of a layer."""
    layer, layers = wide_checkpoint(tmp_path / "first", 1), 10
    wide_checkpoint(tmp_path / "whole", layers)
    command = [sys.executable, "-c", MEMORY, tmp_path / "first", tmp_path / "whole"]
    # What the allocator keeps of freed memory is not at issue here.
    answer = subprocess.run(
        command, capture_output=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    held, peak = (int(word) for word in answer.stdout.split())
    packed = layers * layer * (4 + 32 / 128) / 8
    assert held < 1.2 * packed
    assert peak < packed + 5 * layer
