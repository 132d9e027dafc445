"""The model learns which tokens' states are read, and only where others may be left out."""

import pytest
from quire import LLM, SamplingParams
from quire.models.decoder import Decoder


@pytest.fixture
def asked(monkeypatch):
    """(tokens, what was wanted) of each step."""
    found, forward = [], Decoder.forward

    def noting(self, ids, positions, ctx):
        found.append((len(ids), None if ctx.wanted is None else ctx.wanted.tolist()))
        return forward(self, ids, positions, ctx)

    monkeypatch.setattr(Decoder, "forward", noting)
    return found


def steps(checkpoint, asked, prompts, params, **options):
    llm = LLM(checkpoint("llama"), dtype="float32", device="cpu", block_size=4, num_kv_blocks=100, **options)
    asked.clear()
    llm.generate(prompts, params, use_tqdm=False)
    return asked


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (64, [(12, [6, 11]), (2, None)]),
        (8, [(8, [7]), (5, [0, 4]), (1, None)]),  # 3 of the first prompt beside the second; its end beside a token
    ],
)
def test_of_prompts_the_last_tokens_of_single_tokens_all(checkpoint, asked, budget, expected):
    prompts, params = [[5] * 7, [6] * 5], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    found = steps(checkpoint, asked, prompts, params, max_num_batched_tokens=budget, max_num_seqs=2)
    assert found == expected


def test_of_a_chunk_in_which_nothing_is_sampled_one(checkpoint, asked):
    params = SamplingParams(temperature=0, max_tokens=1)
    found = steps(checkpoint, asked, [[5] * 20], params, max_num_batched_tokens=8, max_num_seqs=1)
    assert found == [(8, [0]), (8, [0]), (4, [3])]


def test_log_probabilities_of_a_prompt_need_all(checkpoint, asked):
    params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=given) for given in (None, 0)]
    assert steps(checkpoint, asked, [[5] * 7, [6] * 5], params) == [(12, None)]
