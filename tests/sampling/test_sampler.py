"""The torch sampler passes the kit, and agrees with definitions written another way."""

import numpy as np
import pytest
import torch
from quire.sampling.philox import philox, seeded_uniform
from quire.sampling.sampler import TorchSampler, candidate_weights
from quire.testing.sampler import CHI_SQUARE_LIMIT, CLOSE_DRAWS, DRAWS, SamplerConformance, chi_square

MASK = 0xFFFFFFFF


class TestTorchSampler(SamplerConformance):
    @pytest.fixture
    def sampler_class(self):
        return TorchSampler


def scalar_philox(counter, key):
    """Philox4x32-10 in Python integers, straight from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


# Known answers published with the authors' library, Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    result = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in result) == words
    assert tuple(scalar_philox(counter, key)) == words


def test_philox_equals_scalar_on_random_input():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (200, 6))
    columns = [torch.from_numpy(words[:, index].copy()) for index in range(6)]
    result = torch.stack(philox(tuple(columns[:4]), tuple(columns[4:])), -1)
    for row, ours in zip(words.tolist(), result.tolist(), strict=True):
        assert ours == scalar_philox(row[:4], row[4:])


def test_uniform_is_what_the_module_documents():
    seeds, positions = torch.tensor([5, -1, 2**62]), torch.tensor([0, 3, 2**40])
    for seed, position, ours in zip(
        seeds.tolist(), positions.tolist(), seeded_uniform(seeds, positions).tolist(), strict=True
    ):
        seed %= 2**64
        x0, x1, *_ = scalar_philox((position & MASK, position >> 32, 0, 0), (seed & MASK, seed >> 32))
        assert ours == ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53


def test_uniform_is_uniform():
    draws = seeded_uniform(torch.arange(50_000) % 100, torch.arange(50_000) // 100)
    counts = torch.histc(draws, 20, 0, 1)
    chi_square = ((counts - 2500) ** 2 / 2500).sum()
    assert chi_square < 50  # 19 degrees of freedom: exceeded once in ten thousand seeds


def brute_force(logits, temperature, top_k, top_p, min_p):
    """The candidates by the definition: sort, cut, with ties kept."""
    p = np.exp((logits - logits.max()) / temperature)
    keep = np.ones(len(p), bool)
    if top_k:
        keep &= logits >= np.sort(logits)[::-1][min(top_k, len(p)) - 1]
    if top_p < 1:
        inside = np.where(keep, p, 0)
        order = np.argsort(-inside, kind="stable")
        reached = np.cumsum(inside[order]) >= top_p * inside.sum() * (1 - 1e-12)
        keep &= inside >= inside[order[np.argmax(reached)]]
    if min_p:
        keep &= p >= min_p
    return np.where(keep, p, 0)


@pytest.mark.parametrize("seed", range(30))
def test_candidates_by_definition(seed):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, 60), 1)  # rounded, so that there are ties
    settings = (
        float(rng.choice([0.3, 1.0, 2.0])),
        int(rng.choice([0, 1, 5, 100])),
        float(rng.choice([1.0, 0.999, 0.9, 0.3])),
        float(rng.choice([0.0, 0.05, 0.5])),
    )
    ours = candidate_weights(torch.tensor(logits, dtype=torch.float32), *settings).numpy()
    theirs = brute_force(logits.astype(np.float32).astype(np.float64), *settings)
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_tiny_temperature_is_greedy():
    logits = torch.tensor([1.0, 5.0, 4.9999])
    weights = candidate_weights(logits, 1e-30, 0, 1.0, 0.0)
    assert weights.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("draws", "off"), [(DRAWS, 0.06), (CLOSE_DRAWS, 0.03)])
def test_the_kit_has_the_power_that_it_states(draws, off):
    exact = torch.tensor([0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.03], dtype=torch.float64)
    wrong = exact * (0.7 - off) / 0.7
    wrong[0] = 0.3 + off
    rng = np.random.default_rng(0)

    def share_over_the_limit(chances):
        trials = rng.multinomial(draws, chances.numpy(), size=3000)
        values = [chi_square(torch.from_numpy(trial).double(), exact * draws) for trial in trials]
        return sum(value > CHI_SQUARE_LIMIT[7] for value in values) / len(values)

    assert share_over_the_limit(wrong) > 0.99
    assert share_over_the_limit(exact) < 0.002
