"""Greedy output of the whole engine equals transformers' generate: 30 prompts on four architectures, float32."""

import random

import pytest
import torch
from quire import LLM, SamplingParams
from quire.testing.tiny_models import VOCAB, reference_model

NEW_TOKENS = 16


def prompts(count):
    rng = random.Random(7)
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]
    return [
        shared[: rng.randrange(41)] + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 30))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_greedy_equals_generate(checkpoint, name):
    folder = checkpoint(name)
    reference = reference_model(folder)
    llm = LLM(folder, dtype="float32", max_num_batched_tokens=64, num_kv_blocks=60, block_size=8)
    asked = prompts(30)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    outputs = llm.generate(asked, params, use_tqdm=False)
    assert llm.engine.kv_stats().hit_tokens > 0, "the prompts share beginnings, so the cache must be hit"
    for prompt, output in zip(asked, outputs, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, do_sample=False, max_new_tokens=NEW_TOKENS, attention_mask=torch.ones_like(ids)
        )
        expected = theirs[0, len(prompt) :].tolist()
        ours = output.outputs[0].token_ids
        if ours != expected:  # a flip is allowed only where two tokens are as good as equal
            at = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b)
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + expected[:at]])).logits[0, -1]
            assert abs(float(logits[ours[at]] - logits[expected[at]])) < 1e-3
    assert llm.engine.kv_stats().used == 0
