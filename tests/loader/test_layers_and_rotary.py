"""Rotary tables against transformers, the op factory's choices, and config.json's keys read with their types."""

import pytest
import torch
from quire import ConfigError, UnsupportedModel
from quire.contract.ops import GatedActSpec, OpSet, RMSNormSpec
from quire.layers.factory import Operations
from quire.layers.rotary import Rotary, inverse_frequencies
from quire.layers.weights import WeightTable
from quire.loader.select import select_spec
from quire.models import llama, phi3, qwen3
from quire.models.settings import Settings
from quire.testing.tiny_models import LLAMA3, LONG, YARN

BASE = {"max_position_embeddings": 256, "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 50000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        LLAMA3,
        YARN,
        YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        LONG,
    ],
)
def test_frequencies_equal_transformers(parameters):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    partial = parameters.get("partial_rotary_factor", 1.0)
    config = LlamaConfig(**BASE, rope_parameters=dict(parameters), partial_rotary_factor=partial)
    ours, factor = inverse_frequencies(Settings(BASE | {"rope_parameters": parameters}).rope(16, partial=True), 256)
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, 16, 2).float() / 16
        theirs, their_factor = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=256)
    torch.testing.assert_close(ours, theirs)
    assert factor == pytest.approx(their_factor)


def test_longrope_chooses_by_the_length_it_serves():
    rope = Settings(BASE | {"rope_parameters": LONG}).rope(16, partial=True)
    short, long = (inverse_frequencies(rope, length)[0] for length in (128, 129))
    assert torch.allclose(short / long, torch.tensor(LONG["long_factor"]) / torch.tensor(LONG["short_factor"]))


def test_older_files_name_theta_and_scaling_apart():
    new = Settings(BASE | {"rope_parameters": LLAMA3}).rope(16)
    old_scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")} | {
        "type": "llama3"
    }
    old = Settings(BASE | {"rope_theta": 10000.0, "rope_scaling": old_scaling}).rope(16)
    assert torch.equal(inverse_frequencies(new, 256)[0], inverse_frequencies(old, 256)[0])


def test_tables_hold_the_angles():
    rotary = Rotary(Settings(BASE).rope(16), 100, torch.device("cpu"))
    cos, sin = rotary.at(torch.tensor([0, 7]))
    assert torch.equal(cos[0], torch.ones(8))
    assert float(sin[1, 0]) == pytest.approx(float(torch.sin(torch.tensor(7.0))))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (BASE | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (BASE | {"num_attention_heads": "four"}, "num_attention_heads"),
        ({key: value for key, value in BASE.items() if key != "hidden_size"}, "hidden_size"),
        (BASE | {"hidden_act": "relu2"}, "relu2"),
        (BASE | {"pretraining_tp": 2}, "pretraining_tp"),
        (BASE | {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(config, word):
    full = {"vocab_size": 9, "intermediate_size": 8, "num_hidden_layers": 1, "hidden_act": "silu"} | config
    with pytest.raises(UnsupportedModel, match=word):
        llama.config_from_hf(full)


class Only(OpSet):
    def __init__(self, name, kinds):
        self.name = name
        self.kinds = frozenset(kinds)

    def build(self, spec):
        return (self.name, spec.kind)


NORM, ACT = RMSNormSpec(4, 1e-6, torch.float32), GatedActSpec(4, "silu", torch.float32)


def test_the_first_op_set_that_fits_serves():
    operations = Operations(
        [("fast", Only("fast", ["gated_act"])), ("plain", Only("plain", ["gated_act", "rms_norm"]))], {}
    )
    assert operations.op(ACT) == ("fast", "gated_act")
    assert operations.op(NORM) == ("plain", "rms_norm")
    assert operations.chosen == {"gated_act": {"fast"}, "rms_norm": {"plain"}}


def test_a_named_op_set_never_falls_back():
    sets = [("fast", Only("fast", ["gated_act"])), ("plain", Only("plain", ["gated_act", "rms_norm"]))]
    assert Operations(sets, {"default": "plain"}).op(ACT) == ("plain", "gated_act")
    with pytest.raises(ConfigError, match="rms_norm"):
        Operations(sets, {"rms_norm": "fast"}).op(NORM)


def test_weights_go_where_they_belong():
    table, taken = WeightTable(), []
    table.expect("a", (2, None), taken.append)
    table.expect("b", (1,), taken.append, required=False)
    assert table.missing() == ["a"]
    assert not table.load("c", torch.zeros(1))
    with pytest.raises(UnsupportedModel, match=r"'a'.*\[3, 3\]"):
        table.load("a", torch.zeros(3, 3))
    assert table.load("a", torch.zeros(2, 7))
    assert table.missing() == []
    with pytest.raises(AssertionError, match="'a'"):
        table.expect("a", (1,), taken.append)


def test_the_spec_is_found_by_architecture_or_the_reasons_are_told():
    specs = [("llama", llama.SPEC), ("qwen3", qwen3.SPEC), ("phi3", phi3.SPEC)]
    assert select_spec(specs, {"architectures": ["Qwen3ForCausalLM"]})[0] == "qwen3"
    with pytest.raises(UnsupportedModel, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        select_spec(specs, {"architectures": ["MambaForCausalLM"]})
