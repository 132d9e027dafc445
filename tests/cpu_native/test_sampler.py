"""cpu_native's sampler passes the kit, and draws the reference's tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.plugin import SamplerInit
from quire.sampling.sampler import TorchSampler
from quire.testing.sampler import RowParams, SamplerConformance, sampling_batch
from quire_cpu_native.build import missing
from quire_cpu_native.sampler import NativeSampler

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class TestNativeSampler(SamplerConformance):
    @pytest.fixture
    def sampler_class(self):
        return NativeSampler


ROWS = st.builds(
    RowParams,
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 20, 300, 10**6]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
)


def both(logits, rows):
    batch = sampling_batch(rows)
    init = SamplerInit(torch.device("cpu"), logits.shape[1], len(rows))
    return tuple(sampler(init).sample(logits, batch) for sampler in (TorchSampler, NativeSampler))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=8),
    vocab=st.sampled_from([1, 2, 31, 64, 65, 700, 5000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0, 1e4]),
    coarse=st.booleans(),
    data=st.data(),
)
def test_tokens_are_the_references(rows, vocab, spread, coarse, data):
    """Ties, forbidden tokens, and rows that are apart are among them."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    logits = torch.randn(len(rows), vocab + 3, generator=generator)[:, 2 : vocab + 2] * spread
    logits = logits.round() if coarse else logits
    forbidden = torch.rand(len(rows), vocab, generator=generator) < 0.3
    forbidden[:, vocab // 2] = False
    reference, native = both(logits.masked_fill(forbidden, float("-inf")), rows)
    assert native.tolist() == reference.tolist()


def test_a_large_vocabulary():
    logits = torch.randn(24, 151_936, generator=torch.Generator().manual_seed(0)) * 2.5
    rows = [
        RowParams((0.6, 1.0, 3.0)[i % 3], (0, 50, 5000)[i // 3 % 3], (1.0, 0.9)[i % 2], (0.0, 0.05)[i // 2 % 2], i, i)
        for i in range(24)
    ]
    reference, native = both(logits, rows)
    assert native.tolist() == reference.tolist()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.sampled_from([1, 15, 16, 17, 511, 513, 700, 16384, 16385, 50_001]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 0.02, 3.0]),
    spoilt=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)), max_size=4),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_greedy_rows_take_the_largest_if_they_are_finite(rows, vocab, dtype, spread, spoilt, bad):
    """Of rows that are apart, with equals, and with single values that are not finite."""
    generator = torch.Generator().manual_seed(rows)
    logits = (spread * torch.randn(rows, vocab + 5, generator=generator)).to(dtype)[:, 3 : vocab + 3]
    for row, column in spoilt:
        logits[int(row * rows), int(column * vocab)] = bad
    before, init = logits.clone(), SamplerInit(torch.device("cpu"), vocab, rows)
    expected = [int(row.numpy().argmax()) if row.isfinite().all() else -1 for row in before.float()]
    found = NativeSampler(init).choose(logits, sampling_batch([RowParams(temperature=0.0)] * rows))
    if dtype == torch.float16:  # there is no kernel for it
        assert found is None
    else:
        assert found.dtype == torch.int32
        assert found.tolist() == expected
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=8),
    vocab=st.sampled_from([1, 2, 31, 64, 65, 700, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    coarse=st.booleans(),
    spoilt=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)), max_size=3),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_chosen_tokens_are_the_references(rows, vocab, dtype, coarse, spoilt, bad):
    """Of the logits as the model has left them; rows that are apart, ties, and values that are not finite."""
    generator = torch.Generator().manual_seed(len(rows) + vocab)
    logits = 3 * torch.randn(len(rows), vocab + 3, generator=generator)
    logits = (logits.round() if coarse else logits).to(dtype)[:, 2 : vocab + 2]
    expected = both(logits.float(), rows)[0]
    for row, column in spoilt:
        logits[int(row * len(rows)), int(column * vocab)] = bad
        expected[int(row * len(rows))] = -1
    found = NativeSampler(SamplerInit(torch.device("cpu"), vocab, len(rows))).choose(logits, sampling_batch(rows))
    assert found.dtype == torch.int32
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_distribution_gives_some_token_and_harms_no_other(bad):
    """The engine fails such a row itself."""
    rows = [RowParams(0.7, 3, 0.9, 0.1, seed, 5) for seed in range(3)]
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 7:] = bad
    broken[1, :7] = bad if bad == float("-inf") else 0.0
    tokens, whole = both(logits, rows)[1], NativeSampler(SamplerInit(torch.device("cpu"), 100, 3))
    found = whole.sample(broken, sampling_batch(rows))
    assert 0 <= found[1] < 100
    assert found[[0, 2]].tolist() == tokens[[0, 2]].tolist()
