"""Scales of an 8-bit KV cache in a checkpoint: found by their names, given to attention, or refused.

Keys and values of the bundled model are made 4096 times as large, and what reads them so much smaller: the same model
in exact arithmetic, whose cache overflows in 8 bits unless the checkpoint's scales are taken.
"""

import logging
import shutil

import pytest
import torch
from quire import LLM, SamplingParams, UnsupportedModel
from quire.layers.kv_scales import KVScales
from quire.loader.checkpoint import bundled_folder
from quire.models.decoder import AttentionLayer
from safetensors.torch import load_file, save_file

FACTOR = 4096.0
LARGER = {"k_norm.weight": FACTOR, "v_proj.weight": FACTOR, "q_norm.weight": 1 / FACTOR, "o_proj.weight": 1 / FACTOR}
NAMES = {"compressed-tensors": ("k_scale", "v_scale"), "modelopt": ("k_proj.k_scale", "v_proj.v_scale")}


def rescaled(folder, names=(), shape=()):
    """The bundled model with larger keys and values, and scales of these names."""
    shutil.copytree(bundled_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        factor = next((factor for ending, factor in LARGER.items() if name.endswith(f"self_attn.{ending}")), 1.0)
        tensors[name] = tensor.float() * factor
    scale = torch.full(shape, FACTOR)
    tensors |= {f"model.layers.{i}.self_attn.{name}": scale.clone() for i in range(6) for name in names}
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def answer(model, **options):
    llm = LLM(model, device="cpu", dtype="float32", num_kv_blocks=40, **{"kv_cache_dtype": "fp8_e4m3"} | options)
    chat = [{"role": "user", "content": "What is 27+45?"}]
    tokens = llm.chat(chat, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    return tokens[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def unscaled():
    return answer(None)


@pytest.mark.parametrize(("names", "shape"), [(NAMES["compressed-tensors"], (1,)), (NAMES["modelopt"], ())], ids=NAMES)
def test_a_checkpoints_scales_are_used(names, shape, unscaled, tmp_path):
    assert answer(rescaled(tmp_path / "model", names, shape)) == unscaled


def test_it_overflows_without_them(unscaled, tmp_path):
    """The test above can fail: for want of the keys' scales, and of the values'."""
    for names in (("k_scale",), ("v_scale",)):
        assert answer(rescaled(tmp_path / "-".join(("model", *names)), names)) != unscaled


def test_another_cache_does_without(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="quire"):
        tokens = answer(rescaled(tmp_path / "model", NAMES["modelopt"]), kv_cache_dtype="auto")
    assert len(tokens) == 12
    assert "scales are not used; they are for kv_cache_dtype fp8_e4m3" in caplog.text


def layers(count):
    return [AttentionLayer(index, 2, 1, 8, 8, 1.0) for index in range(count)]


def test_layers_get_their_own():
    scales = KVScales()
    assert scales.load("model.layers.2.self_attn.qkv_proj.v_scale", torch.tensor(7.0))
    assert scales.load("model.layers.1.self_attn.k_scale", torch.tensor(0.5))
    assert scales.load("model.language_model.layers.12.self_attn.v_proj.v_scale", torch.tensor([3.0]).bfloat16())
    found = scales.applied(layers(13))
    assert {(layer.k_scale, layer.v_scale) for layer in found} == {(1.0, 1.0), (0.5, 1.0), (1.0, 3.0), (1.0, 7.0)}
    assert found[1].k_scale == 0.5
    assert found[12].v_scale == 3.0


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.k_scale", "layers.1.self_attn.k_proj.v_scale", "layers.1.self_attn.q_scale", "k_scale"]
)
def test_other_names_are_left_to_others(name):
    assert not KVScales().load(name, torch.ones(()))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.ones(2, 1), r"shape \[2, 1\]"), (torch.zeros(()), "is 0.0"), (torch.tensor(float("nan")), "is nan")],
)
def test_scales_that_cannot_be_used_are_refused(tensor, words):
    with pytest.raises(UnsupportedModel, match=f"layers.0.self_attn.k_scale.*{words}"):
        KVScales().load("model.layers.0.self_attn.k_scale", tensor)


def test_scales_of_a_layer_that_is_not_there():
    scales = KVScales()
    scales.load("model.layers.7.self_attn.k_scale", torch.ones(()))
    with pytest.raises(UnsupportedModel, match=r"layers \[7\]"):
        scales.applied(layers(2))
