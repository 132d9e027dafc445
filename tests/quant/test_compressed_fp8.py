"""compressed-tensors and FP8: the kit, every form against its definition, the public packer, whole checkpoints."""

import pytest
import torch
from quire import LLM, SamplingParams, UnsupportedModel
from quire.plugin import LinearSpec, QuantInit
from quire.testing.certify import conformance
from quire.testing.quantization import reference_op
from quire.testing.tiny_models import reference_model
from quire_quant.bits import pack
from quire_quant.compressed import CompressedTensorsMethod
from quire_quant.fp8 import FP8Method
from quire_quant.testing import compressed_tensors, fp8_tensors, quantized_checkpoint, random_layer

CPU = torch.device("cpu")
NAME = "model.layer"
PROMPT = [5, 7, 11, 13, 17, 19, 23, 200, 31, 37]


def config(bits=4, group_size=32, form="pack-quantized", **weights):
    strategy = "channel" if group_size is None else "group"
    scheme = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def headers(tensors, name=NAME):
    return {f"{name}.{suffix}": (tuple(t.shape), t.dtype) for suffix, t in tensors.items()}


def dequantized(method_class, settings, tensors, outputs, inputs):
    spec = LinearSpec(inputs, outputs, False, torch.float64, name=NAME)
    linear = method_class(QuantInit(settings, headers(tensors), CPU, torch.float64, op=reference_op)).linear(
        spec, (spec,)
    )
    return linear.dequantize(linear.finalize(tensors, CPU))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "case", [{"sym": True}, {}, {"group_size": None}, {"group_size": 24, "act_order": True}], ids=str
)
def test_packed_forms(bits, case):
    group_size = case.get("group_size", 32)
    sym, act_order = case.get("sym", False), case.get("act_order", False)
    layer = random_layer(96, 32, bits, group_size or -1, sym=sym, act_order=act_order, seed=bits)
    tensors = compressed_tensors(layer, bits, sym=sym, g_idx=act_order)
    weight = dequantized(CompressedTensorsMethod, config(bits, group_size), tensors, 32, 96)
    torch.testing.assert_close(weight, layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_packing_is_that_of_the_public_library(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = torch.arange(32 * 64).view(32, 64) % (1 << bits) - (1 << (bits - 1))
    codes = signed + (1 << (bits - 1))
    for dim, ours in ((1, pack(codes.t(), bits).t()), (0, pack(codes, bits))):
        assert torch.equal(helpers.pack_to_int32(signed.to(torch.int8), bits, packed_dim=dim), ours)
        back = helpers.unpack_from_int32(ours.contiguous(), bits, signed.shape, packed_dim=dim)
        assert torch.equal(back.long(), signed)


def test_words_of_older_releases_hold_whole_codes():
    layer = random_layer(96, 32, 3, 32)
    tensors = compressed_tensors(layer, 3)

    def older(codes):
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 10)).view(len(codes), -1, 10)
        return sum(padded[..., i] << (3 * i) for i in range(10)).to(torch.int32)

    tensors |= {"weight_packed": older(layer.codes.t()), "weight_zero_point": older(layer.zeros).t().contiguous()}
    weight = dequantized(CompressedTensorsMethod, config(3), tensors, 32, 96)
    torch.testing.assert_close(weight, layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (160,), (160, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("method_class", [FP8Method, CompressedTensorsMethod])
def test_fp8_scales(method_class, shape):
    tensors, exact = fp8_tensors(300, 160, shape, seed=0)
    settings = {} if method_class is FP8Method else config(8, None, "float-quantized", type="float")
    weight = dequantized(method_class, settings, tensors, 160, 300)
    torch.testing.assert_close(weight, exact, rtol=1e-6, atol=1e-7)


def test_fp8_blocks_of_another_size():
    tensors, exact = fp8_tensors(100, 80, (3, 4), block=32, name="weight_scale_inv", seed=0)
    weight = dequantized(FP8Method, {"weight_block_size": [32, 32]}, tensors, 80, 100)
    torch.testing.assert_close(weight, exact, rtol=1e-6, atol=1e-7)


TestCompressedTensors = conformance("quantization", "compressed-tensors")
TestFP8 = conformance("quantization", "fp8")


def check(folders, **options):
    quantized, plain = folders
    with torch.inference_mode():
        theirs = reference_model(plain)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = LLM(str(quantized), dtype="float32", num_kv_blocks=40).generate([PROMPT], params, use_tqdm=False)
    for row, entries in enumerate(out.prompt_logprobs[1:]):
        for token, entry in entries.items():
            assert abs(entry.logprob - theirs[row, token].item()) < 1e-3


def test_a_packed_checkpoint_of_two_groups(tmp_path):
    def quantize(name, inputs, outputs):
        bits = 8 if "down_proj" in name or "v_proj" in name else 4
        layer = random_layer(inputs, outputs, bits, 32, sym=bits == 8, seed=len(name))
        return compressed_tensors(layer, bits, sym=bits == 8), layer.weight

    groups = {
        "a": {"targets": ["re:.*(down|v)_proj$"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}},
        "b": config()["config_groups"]["group_0"],
    }
    check(quantized_checkpoint("llama", tmp_path, quantize, config() | {"config_groups": groups}))


@pytest.mark.parametrize(
    ("shape_of", "static"),
    [(lambda n, k: (), True), (lambda n, k: (n, 1), False), (lambda n, k: (-(-n // 32), -(-k // 32)), False)],
    ids=["tensor", "output", "block"],
)
def test_fp8_checkpoints(shape_of, static, tmp_path):
    def quantize(name, inputs, outputs):
        tensors, weight = fp8_tensors(
            inputs, outputs, shape_of(outputs, inputs), block=32, name="weight_scale_inv", seed=len(name)
        )
        return tensors | ({"input_scale": torch.rand(()) + len(name)} if static else {}), weight

    check(quantized_checkpoint("qwen3", tmp_path, quantize, {"quant_method": "fp8", "weight_block_size": [32, 32]}))


@pytest.mark.parametrize(
    ("method_class", "settings", "words"),
    [
        (CompressedTensorsMethod, config(form="int-quantized"), "format 'int-quantized' is not supported.*export"),
        (
            CompressedTensorsMethod,
            config() | {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
            "scheme has type 'int'",
        ),
        (CompressedTensorsMethod, config() | {"kv_cache_scheme": {"dynamic": True}}, "dynamic True; read is False"),
        (CompressedTensorsMethod, config() | {"kv_cache_scheme": {"strategy": "attn_head"}}, "strategy 'attn_head'"),
        (CompressedTensorsMethod, config() | {"sparsity_config": {"format": "sparse-24"}}, "sparse"),
        (CompressedTensorsMethod, config(9), "num_bits is 9"),
        (CompressedTensorsMethod, config() | {"config_groups": {}}, "no group.*targets it"),
        (CompressedTensorsMethod, config(8), r"weight_packed has shape \[32, 12\].*make it \[32, 24\]"),
        (FP8Method, {"weight_block_size": 128}, "weight_block_size is 128"),
    ],
)
def test_refusals(method_class, settings, words):
    tensors = compressed_tensors(random_layer(96, 32, 4, 32), 4)
    with pytest.raises(UnsupportedModel, match=words):
        dequantized(method_class, settings, tensors, 32, 96)


def test_fp8_refusals():
    tensors, _ = fp8_tensors(300, 160, (3, 3), seed=0)
    with pytest.raises(UnsupportedModel, match=r"has shape \[3, 3\].*\[2, 3\] for blocks of \[128, 128\]"):
        dequantized(FP8Method, {}, tensors, 160, 300)
    with pytest.raises(UnsupportedModel, match="no weight_scale or weight_scale_inv"):
        dequantized(FP8Method, {}, {"weight": tensors["weight"]}, 160, 300)
