import pytest
import torch
from quire.plugin import SamplerInit
from quire.testing.sampler import RowParams, SamplerConformance, sampling_batch
from quire_xtc.sampler import XtcOptions, XtcSampler, exclude_top_choices


class TestXtc(SamplerConformance):
    @pytest.fixture
    def sampler_class(self):
        return XtcSampler


def drawn(count, **options):
    """Tokens of many positions, from probabilities 0.4, 0.3, 0.2, 0.1."""
    sampler = XtcSampler(SamplerInit(torch.device("cpu"), 4, count, XtcOptions(**options)))
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(count, 1)
    return sampler.sample(logits, sampling_batch([RowParams(seed=3, position=index) for index in range(count)]))


def test_only_the_last_top_choice_and_what_is_below_remain():
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert exclude_top_choices(weights, 0.15).tolist() == [0.0, 0.0, 0.2, 0.1]
    assert exclude_top_choices(weights, 0.35).tolist() == weights.tolist()
    assert exclude_top_choices(weights, 0.5).tolist() == weights.tolist()


def test_always_excluded():
    assert set(drawn(200, probability=1.0, threshold=0.15).tolist()) == {2, 3}


def test_excluded_as_often_as_asked_for():
    counts = torch.bincount(drawn(4000, probability=0.5, threshold=0.15), minlength=4) / 4000
    # Half of the draws as they were, half of what remains: 0.2 and 0.1 of 0.3.
    expected = torch.tensor([0.2, 0.15, 0.1 + 1 / 3, 0.05 + 1 / 6])
    assert (counts - expected).abs().max() < 0.04  # five standard deviations


def test_the_coin_does_not_follow_the_draw():
    plain, coin = drawn(4000, probability=0.0), drawn(4000, probability=0.5, threshold=0.15)
    kept = (plain < 2) & (coin < 2)  # the coin left these alone
    share = kept.sum() / (plain < 2).sum()
    assert abs(share - 0.5) < 0.05


def test_greedy_rows_stay_greedy():
    sampler = XtcSampler(SamplerInit(torch.device("cpu"), 3, 2, XtcOptions(probability=1.0)))
    rows = [RowParams(temperature=0.0), RowParams(temperature=1.0)]
    assert int(sampler.sample(torch.tensor([[1.0, 0.9, 0.8]] * 2), sampling_batch(rows))[0]) == 0
