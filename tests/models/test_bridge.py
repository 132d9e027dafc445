"""Architectures without a native version, through transformers' own code and our attention."""

import pytest
from quire.models.bridge import SPEC
from quire.testing.model import ModelConformance
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.ops import TorchOps


@pytest.mark.parametrize("architecture", ["olmo2", "stablelm", "gpt_neox"])
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
