"""What a family reads from config.json is what transformers reads, whatever keys the file leaves out."""

import copy
import dataclasses
import importlib
import json

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from quire import UnsupportedModel
from quire.layers.rotary import inverse_frequencies
from quire.testing.tiny_models import ARCHITECTURES, COMMON

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi3"]


def class_of(family):
    prefix = ARCHITECTURES[family][0]
    return getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")


def written(family, settings):
    """config.json as transformers writes it for these settings."""
    return json.loads(class_of(family)(**copy.deepcopy(settings)).to_json_string())


def read(family, config):
    return importlib.import_module(f"quire.models.{family}").config_from_hf(config)


def facts(config):
    """All that the config says, rotary settings as the frequencies that they mean."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ropes = {}
    for name, rope in values.pop("ropes").items():
        frequencies, factor = inverse_frequencies(rope, 200)
        ropes[name] = (frequencies.tolist(), factor, rope.rotary_dim)
    return values, ropes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_left_out_means_what_transformers_makes_of_it(family):
    full = written(family, dict(COMMON) | dict(ARCHITECTURES[family][1]))
    compared = 0
    for key in sorted(set(full) - {"model_type"}):
        stripped = {name: value for name, value in full.items() if name != key}
        try:
            theirs = written(family, {name: value for name, value in stripped.items() if name != "model_type"})
            ours = read(family, copy.deepcopy(stripped))
        except (UnsupportedModel, StrictDataclassClassValidationError):
            continue  # refused by name, or no config for transformers either
        assert facts(ours) == facts(read(family, theirs)), f"without {key}"
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_older_files_say_the_same(family):
    """`rope_theta`, `rope_scaling` and the rest at the top, as transformers 4 wrote them."""
    new = written(family, dict(COMMON) | dict(ARCHITECTURES[family][1]))
    old = copy.deepcopy(new)
    rope = old.pop("rope_parameters")
    if family == "gemma3":
        old |= {"rope_theta": rope["full_attention"]["rope_theta"], "sliding_window_pattern": 6}
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old.pop("layer_types")
    else:
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        old["rope_scaling"] = (
            None if rope.pop("rope_type") == "default" else rope | {"type": new["rope_parameters"]["rope_type"]}
        )
    assert facts(read(family, old)) == facts(read(family, new))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["linear", "factor", "None"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "four"}}, ["yarn", "'four'"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ["8"]),
        ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}, ["chunked_attention"]),
        ("gemma2", {"layer_types": ["full_attention"]}, ["1 'layer_types'", "2"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("phi3", {"attention_bias": True}, ["attention_bias"]),
        ("mixtral", {"num_local_experts": None}, ["num_local_experts"]),
    ],
)
def test_what_is_not_honoured_is_named(family, changes, words):
    config = written(family, dict(COMMON) | dict(ARCHITECTURES[family][1])) | changes
    with pytest.raises(UnsupportedModel) as caught:
        read(family, config)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_phi3_had_other_names_for_longrope(name):
    new = written("phi3", dict(COMMON) | dict(ARCHITECTURES["phi3"][1]))
    old = copy.deepcopy(new)
    old["rope_parameters"]["rope_type"] = name
    assert facts(read("phi3", old)) == facts(read("phi3", new))


def test_longrope_takes_its_factor_where_it_is_given():
    config = written("phi3", dict(COMMON) | dict(ARCHITECTURES["phi3"][1]))
    config["rope_parameters"]["factor"] = 16.0
    ours = inverse_frequencies(read("phi3", config).ropes["default"], 128)
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](
        class_of("phi3")(**{key: value for key, value in config.items() if key != "model_type"}), "cpu", seq_len=128
    )
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1])
