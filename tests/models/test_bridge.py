"""Architectures without a native version, through transformers' own code and our attention."""

import pytest
import torch
from quire import UnsupportedModel
from quire.contract.attention import AttentionLayer
from quire.models.bridge import SPEC
from quire.models.bridge_check import check_model
from quire.testing.model import ModelConformance
from quire.testing.tiny_models import make_checkpoint
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.ops import TorchOps


@pytest.mark.parametrize(
    "architecture", ["olmo2", "stablelm", "gpt_neox", "cohere2", "granite", "olmoe", "gpt2", "opt"]
)
class TestBridge(ModelConformance):
    @pytest.fixture
    def spec(self):
        return SPEC

    @pytest.fixture
    def parts(self):
        return CpuRefAttention, TorchOps


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {"a": 1}}, "multimodal"),
        ({"alibi": True}, "ALiBi"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "no-such-model"}, "no-such-model"),
    ],
)
def test_refuses_by_name(changes, reason):
    config = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 99} | changes
    assert any(reason in text for text in SPEC.why_not(config))


@pytest.mark.parametrize(("architecture", "reason"), [("doge", "a way of its own"), ("diffllama", "number of times")])
def test_attention_that_backends_do_not_have_is_refused_at_load(architecture, reason, tmp_path):
    folder = make_checkpoint(architecture, tmp_path / architecture)
    with pytest.raises(UnsupportedModel, match=reason):
        ModelConformance().load(folder, SPEC, (CpuRefAttention, TorchOps))


LAYER = AttentionLayer(0, 2, 2, 4, 4, 0.5)


class Toy:
    """A model of one layer whose attention is called through the registry, with one thing wrong at a time."""

    def __init__(self, fault):
        self.fault, self.layer_idx, self.memory = fault, 0, 0.0
        self.table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))

    def forward(self, ids, positions):
        from transformers import AttentionInterface, AttentionMaskInterface

        plain = self.table[ids] + 0.05 * positions[:, None]
        x = plain + self.memory
        if self.fault == "state":
            self.memory = 3.0 * plain[-1]
        heads = x.view(1, -1, 2, 4).transpose(1, 2)
        near = 3 if self.fault == "window" else 10**9
        mask = AttentionMaskInterface()["quire"](
            mask_function=lambda b, h, q, k: (k <= q + (self.fault == "future")) & (k > q - near)
        )
        if self.fault == "no attention":
            return x
        out, _ = AttentionInterface()["quire"](
            self, heads, heads, heads, mask if self.fault != "own mask" else torch.zeros(1), **self.extras()
        )
        return x + out[0].flatten(1)

    def extras(self):
        wrong = {"softcap": {"softcap": 5.0}, "sinks": {"s_aux": torch.zeros(2)}, "other window": {"sliding_window": 4}}
        return {"scaling": 1.0} | wrong.get(self.fault, {})

    def logits(self, hidden):
        if self.fault == "head":
            self.forward(torch.tensor([1]), torch.tensor([0]))
        return hidden


@pytest.mark.parametrize(
    "fault",
    ["state", "window", "future", "no attention", "own mask", "softcap", "sinks", "other window", "head"],
)
def test_a_model_that_does_not_do_what_was_declared_is_refused(fault):
    for ok, toy in ((True, Toy(None)), (False, Toy(fault))):
        if ok:
            check_model((LAYER,), toy.forward, toy.logits, 50, torch.device("cpu"))
        else:
            with pytest.raises(UnsupportedModel):
                check_model((LAYER,), toy.forward, toy.logits, 50, torch.device("cpu"))


def test_incomplete_experts_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    victim = "model.layers.0.mlp.experts.11.up_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != victim}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts"):
        ModelConformance().load(folder, SPEC, (CpuRefAttention, TorchOps))
