"""The checkpoint that ships: its size, its files, and that it answers in its small world."""

import pytest
import torch
from quire.loader.checkpoint import bundled_folder
from tiny.data import evaluation_set
from tiny.evaluate import accuracy, transformers_backend
from tiny.model import MAX_POSITIONS, build_model
from tiny.train import MAIN, SECOND, export, rate
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

LIMIT = 6_000_000
SURE = {"add2": 0.9, "sub2": 0.9, "add2-think": 0.9, "copy": 0.8, "json": 0.9, "tool": 0.7, "unknown": 0.9, "talk": 0.9}
"""What a smoke test on few problems must reach: below what the README reports, so that chance does not fail it."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_folder())


def test_the_folder_is_small_and_readable():
    files = list(bundled_folder().iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMIT
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)


def test_configurations_load(tokenizer):
    config = AutoConfig.from_pretrained(bundled_folder())
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length == MAX_POSITIONS
    generation = GenerationConfig.from_pretrained(bundled_folder())
    assert not generation.do_sample
    assert generation.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template


def test_it_answers_in_its_world(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32)
    problems = {name: samples for name, samples in evaluation_set(9, 10).items() if name in SURE}
    table = accuracy(transformers_backend(model, tokenizer), tokenizer, problems)
    low = {name: (right, of) for name, (right, of) in table.items() if right < SURE[name] * of - 1}
    assert not low


def test_an_export_loads_as_it_was(tmp_path, tokenizer):
    model = build_model(1, tokenizer.eos_token_id, tokenizer.pad_token_id)
    export(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("stage", [MAIN, SECOND])
def test_the_rate_warms_up_stays_and_falls_to_zero(stage):
    assert rate(0.0, stage.flat_until) == 0.0
    assert rate(0.3, stage.flat_until) == 1.0
    assert rate(1.0, stage.flat_until) == 0.0
    assert 0.0 < rate(0.9, stage.flat_until) < 0.5
