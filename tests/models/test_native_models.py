"""Each native family against transformers, on a random checkpoint."""

import importlib

import pytest
from quire.testing.model import ModelConformance
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.ops import TorchOps

FAMILIES = {
    "llama": "llama",
    "llama-linear": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "mixtral": "mixtral",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
}


@pytest.mark.parametrize("architecture", FAMILIES)
class TestNativeModel(ModelConformance):
    @pytest.fixture
    def spec(self, architecture):
        return importlib.import_module(f"quire.models.{FAMILIES[architecture]}").SPEC

    @pytest.fixture
    def parts(self):
        return CpuRefAttention, TorchOps
