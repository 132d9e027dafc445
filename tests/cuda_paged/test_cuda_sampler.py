"""The sampling kernel passes the kit in Triton's interpreter, and draws the very tokens of the reference sampler."""

import pytest
import torch
from quire.sampling.philox import seeded_uniform
from quire.sampling.sampler import TorchSampler
from quire.testing.sampler import RowParams, SamplerConformance, sampling_batch
from quire_cuda_paged.sampler import CudaSampler


class LongTurns(CudaSampler):
    """Fewer, longer turns of the loops: the interpreter's time goes by their number."""

    block = 8192


class TestCudaSampler(SamplerConformance):
    """All but the frequencies, which take tens of thousands of draws: the tokens are held to the reference's below."""

    test_frequencies = test_frequencies_over_seeds = None
    num_rows = 8

    @pytest.fixture
    def sampler_class(self):
        return LongTurns


def both(logits, rows):
    batch = sampling_batch(rows)
    init = SamplerConformance().make
    return [init(kind, logits.shape[1]).sample(logits.clone(), batch).tolist() for kind in (CudaSampler, TorchSampler)]


def random_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return [
        RowParams(
            temperature=pick(0.0, 0.3, 1.0, 2.0),
            top_k=pick(0, 1, 5, 50, 10_000),
            top_p=pick(1.0, 0.999, 0.9, 0.3, 1e-6),
            min_p=pick(0.0, 0.02, 0.5, 1.0),
            seed=pick(0, -1, 2**62, 17) + index,
            position=pick(0, 3, 2**40) + index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("vocab_size", [1, 60, 2500])
def test_tokens_equal_the_reference(vocab_size, seed):
    """Equal seeds give equal tokens, with ties, with equal zeros of both signs, whatever is cut off."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, vocab_size, generator=generator) * 3
    logits[:4] = logits[:4].mul(4).round() / 4  # ties
    logits[8] = -logits[8].abs() - 1.0
    logits[10, ::2] = -0.0
    logits[10, 1::2] = 0.0
    logits[11, : vocab_size // 2] = float("-inf")
    ours, exact = both(logits, random_rows(12, seed))
    assert ours == exact


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.3}])
def test_ties_with_the_threshold_stay_and_zero_has_no_sign(cut):
    """Four equal logits: whatever cuts one of them off would have to cut off all."""
    logits = torch.tensor([[0.0, -0.0, -1.0, 0.0, -0.0]]).repeat(8, 1)
    rows = [RowParams(seed=7, position=index, **cut) for index in range(8)]
    ours, exact = both(logits, rows)
    assert ours == exact
    assert len(set(ours)) > 2


def test_many_likely_tokens_are_told_apart():
    """In float32 the cumulative sum of so many equal weights would be off by more than a token."""
    rows = [RowParams(seed=5, position=index) for index in range(4)]
    ours, exact = both(torch.zeros(4, 40_000), rows)
    assert ours == exact == (seeded_uniform(torch.full((4,), 5), torch.arange(4)) * 40_000).long().tolist()


def test_rows_may_lie_apart_and_columns_too():
    rows = [RowParams(seed=index, top_k=7) for index in range(6)]
    wide = torch.randn(6, 300)
    for logits in (wide[:, 100:200], torch.randn(100, 6).t()):
        ours, exact = both(logits, rows)
        assert ours == exact


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_rows_that_are_not_finite_end_within_the_vocabulary(bad):
    """Whatever the row is worth, the next step may use the token as an index; the other rows do not suffer."""
    logits = torch.randn(4, 50)
    logits[0] = bad
    logits[1, 7] = bad
    rows = [RowParams(top_k=3, top_p=0.5), RowParams(top_k=3, top_p=0.5), RowParams(seed=3), RowParams(temperature=0)]
    ours = CudaSampler(SamplerConformance().make(CudaSampler, 50).init).sample(logits.clone(), sampling_batch(rows))
    assert ((ours >= 0) & (ours < 50)).all()
    assert ours[2:].tolist() == both(logits[2:], rows[2:])[1]
