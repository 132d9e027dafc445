"""`deterministic`: the same bits alone, batched, shuffled, cached, chunked, preempted, in both dtypes."""

import random

import pytest
from quire import LLM, SamplingParams
from quire.testing.tiny_models import VOCAB

TOKENS = 10


def requests():
    rng = random.Random(3)
    shared = [rng.randrange(4, VOCAB) for _ in range(37)]
    prompts = [
        shared[: rng.choice((0, 20, 37))] + [rng.randrange(4, VOCAB) for _ in range(rng.randrange(1, 25))]
        for _ in range(8)
    ]
    params = [
        SamplingParams(
            temperature=0.0 if index % 2 else 0.9, seed=index, max_tokens=TOKENS, ignore_eos=True, logprobs=2
        )
        for index in range(8)
    ]
    return list(zip(prompts, params, strict=True))


def outcome(output):
    sequence = output.outputs[0]
    return sequence.token_ids, [
        [(token, entry.logprob) for token, entry in position.items()] for position in sequence.logprobs
    ]


def run(llm, asked):
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False)
    return [outcome(output) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "qwen3_moe"])
def test_same_bits_everywhere(checkpoint, name, dtype):
    def engine(**options):
        return LLM(checkpoint(name), dtype=dtype, deterministic=True, **({"num_kv_blocks": 200} | options))

    asked = requests()
    alone = engine(enable_prefix_caching=False)
    expected = [run(alone, [item])[0] for item in asked]
    assert run(alone, asked) == expected, "batched"
    shuffled = random.Random(1).sample(range(8), 8)
    assert run(alone, [asked[i] for i in shuffled]) == [expected[i] for i in shuffled], "shuffled"
    for allocator in ("paged", "radix"):
        cached = engine(kv_allocator=allocator, block_size=4)
        assert run(cached, asked) == expected, f"{allocator}: first round"
        assert run(cached, asked) == expected, f"{allocator}: everything cached"
        assert cached.engine.kv_stats().hit_tokens > 0
    for budget in (1, 5, 16, 37):
        assert run(engine(max_num_batched_tokens=budget), asked) == expected, f"chunks of {budget}"
    short = engine(num_kv_blocks=45, block_size=4)
    assert run(short, asked) == expected, "preempted"
    assert short.engine.scheduler_stats().num_preemptions > 0
    forked = engine()
    many = forked.generate([asked[1][0]], asked[1][1].model_copy(update={"n": 3}), use_tqdm=False)[0]
    assert [s.token_ids for s in many.outputs] == [expected[1][0]] * 3, "forked"
