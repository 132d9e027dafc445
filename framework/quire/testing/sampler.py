"""Conformance of samplers: exact candidate sets, right frequencies, and no dependence on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quire.contract.sampling import Sampler, SamplerInit, SamplingBatch

DRAWS = 4_000
"""Draws per set of parameters: a probability of 0.3 that is off by 0.06 is found with a power over 0.99."""
CLOSE_DRAWS = 16_000
"""Draws of the closer look, without truncation: one that is off by 0.03 is found with the same power."""
CHI_SQUARE_LIMIT = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}
"""Degrees of freedom -> value that a right sampler exceeds once in ten thousand runs. Seeds are fixed."""


@dataclass(frozen=True, slots=True)
class RowParams:
    """One row's parameters."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def sampling_batch(rows: Sequence[RowParams], device: torch.device | str = "cpu") -> SamplingBatch:
    """The batch of these rows."""
    return SamplingBatch(
        temperature=torch.tensor([row.temperature for row in rows], device=device),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int32, device=device),
        top_p=torch.tensor([row.top_p for row in rows], device=device),
        min_p=torch.tensor([row.min_p for row in rows], device=device),
        seeds=torch.tensor([row.seed for row in rows], device=device),
        positions=torch.tensor([row.position for row in rows], device=device),
        all_greedy=all(row.temperature == 0 for row in rows),
        any_top_k=any(row.top_k for row in rows),
        any_top_p=any(row.top_p < 1 for row in rows),
        any_min_p=any(row.min_p for row in rows),
    )


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic."""
    return float(((counts - expected) ** 2 / expected).sum())


class SamplerConformance:
    """What every sampler must hold. Subclass, and give the fixture `sampler_class`. `num_rows`: of large batches."""

    device = "cpu"
    num_rows = 24
    logits = (2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -6.0)

    @pytest.fixture
    def sampler_class(self) -> type[Sampler]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `sampler_class`")

    def make(self, sampler_class: type[Sampler], vocab_size: int) -> Sampler:
        return sampler_class(SamplerInit(torch.device(self.device), vocab_size, 64))

    def sample(self, sampler_class: type[Sampler], logits: Tensor, rows: Sequence[RowParams]) -> list[int]:
        sampler = self.make(sampler_class, logits.shape[1])
        tokens: list[int] = sampler.sample(logits.clone().to(self.device), sampling_batch(rows, self.device)).tolist()
        return tokens

    @pytest.mark.parametrize(
        ("params", "allowed"),
        [
            (RowParams(), 8),
            (RowParams(temperature=0.7), 8),
            (RowParams(top_k=3), 3),
            (RowParams(top_p=0.8), 3),
            (RowParams(min_p=0.1), 4),
            (RowParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05), 5),
        ],
    )
    def test_frequencies(self, sampler_class: type[Sampler], params: RowParams, allowed: int) -> None:
        """Over many positions each candidate is drawn as often as its probability says, others never.

        If it fails: divide by the temperature before truncating; top-k, then top-p, then min-p, each over what is left;
        keep the token that crosses top_p.
        """
        scores = torch.tensor(self.logits, dtype=torch.float64) / params.temperature
        exact = torch.softmax(scores[:allowed], 0)  # the logits are sorted, so the candidates stand first
        rows = [
            RowParams(params.temperature, params.top_k, params.top_p, params.min_p, seed=17, position=index)
            for index in range(DRAWS)
        ]
        drawn = torch.tensor(self.sample(sampler_class, torch.tensor([self.logits]).repeat(DRAWS, 1), rows))
        counts = torch.bincount(drawn, minlength=8).double()
        assert counts[allowed:].sum() == 0, "a token was drawn that is no candidate"
        likely = exact * DRAWS >= 5
        limit = CHI_SQUARE_LIMIT[int(likely.sum()) - 1]
        assert chi_square(counts[:allowed][likely], exact[likely] * DRAWS) < limit, (
            f"frequencies are off: {counts.tolist()}"
        )

    def test_frequencies_over_seeds(self, sampler_class: type[Sampler]) -> None:
        """Requests of other seeds draw independently: over neighbouring seeds too, frequencies are as they should be.

        If it fails: mix the seed into the generator's key whole; neighbouring seeds must not give neighbouring draws.
        """
        exact = torch.softmax(torch.tensor(self.logits, dtype=torch.float64), 0)
        rows = [RowParams(seed=seed, position=5) for seed in range(CLOSE_DRAWS)]
        drawn = torch.tensor(self.sample(sampler_class, torch.tensor([self.logits]).repeat(CLOSE_DRAWS, 1), rows))
        counts = torch.bincount(drawn, minlength=8).double()
        assert chi_square(counts, exact * CLOSE_DRAWS) < CHI_SQUARE_LIMIT[7], f"frequencies are off: {counts.tolist()}"
        repeats = float((drawn[1:] == drawn[:-1]).double().mean())
        assert abs(repeats - float(exact.square().sum())) < 0.02, "draws of neighbouring seeds go together"

    def test_greedy_takes_the_largest(self, sampler_class: type[Sampler]) -> None:
        """Temperature 0 takes the largest logit, the lowest id of equals, with sampled rows beside it.

        If it fails: choose by argmax where the temperature is 0, and never divide by it.
        """
        logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
        greedy = RowParams(temperature=0.0)
        assert self.sample(sampler_class, logits, [greedy] * 3) == [1, 0, 0]
        assert self.sample(sampler_class, logits, [greedy, greedy, RowParams(temperature=1.0)])[:2] == [1, 0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_greedy_rows_are_chosen_from_any_dtype(self, sampler_class: type[Sampler], dtype: torch.dtype) -> None:
        """Of logits of any dtype `choose` takes the lowest id of the largest, and says which rows are not finite.

        If it fails: leave `choose` as it is, or look at every element, the last ones of a row too.
        """
        sampler = self.make(sampler_class, 70_001)
        far = torch.finfo(dtype).max
        for rows in (6, 1, 3):
            logits = torch.randn(rows, 70_001, generator=torch.Generator().manual_seed(rows)).clamp(-6, 6)
            for row in range(rows):  # several are the largest, near and far apart; behind one that is a little less
                logits[row, 1000 * row + 6] = 6.96875
                logits[row, [1000 * row + 7, 1000 * row + 8, 60_000]] = 7.0
            logits[-1, [0, 70_000]] = torch.tensor([-far, far])
            spoilt = {0: (70_000, "nan"), 2: (0, "inf"), 3: (33_000, "-inf")} if rows == 6 else {}
            for row, (column, value) in spoilt.items():
                logits[row, column] = float(value)
            expected = [-1 if row in spoilt else 1000 * row + 7 for row in range(rows - 1)] + [70_000]
            batch = sampling_batch([RowParams(temperature=0.0)] * rows, self.device)
            found = sampler.choose(logits.to(self.device, dtype), batch)
            if found is None:
                pytest.skip("`sample` is to be asked")
            assert found.dtype == torch.int32
            assert found.tolist() == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_what_is_chosen_is_what_is_sampled(self, sampler_class: type[Sampler], dtype: torch.dtype) -> None:
        """`choose` gives the tokens that `sample` gives of the same logits in float32, and leaves the logits alone.

        If it fails: widen the logits to float32 before anything is computed from them, and look for what is not finite.
        """
        vocab = 3000
        sampler, generator = self.make(sampler_class, vocab), torch.Generator().manual_seed(3)
        logits = (torch.randn(self.num_rows, vocab, generator=generator) * 2).to(dtype)
        rows = [
            RowParams((0.7, 0.0, 1.3)[i % 3], (0, 20)[i % 2], (1.0, 0.9)[i // 2 % 2], (0.0, 0.02)[i // 4 % 2], i, 7 * i)
            for i in range(self.num_rows)
        ]
        expected = self.sample(sampler_class, logits.float(), rows)
        for row, (column, value) in {1: (vocab - 1, "nan"), 3: (0, "inf"), 6: (1500, "-inf")}.items():
            logits[row, column], expected[row] = float(value), -1
        before = logits.to(self.device)
        given = before.clone()
        # The flags say what may be: an engine may set those of truncation for all steps.
        for batch in (sampling_batch(rows, self.device), replace(sampling_batch(rows, self.device), any_top_k=True)):
            found = sampler.choose(given, batch)
            if found is None:
                pytest.skip("`sample` is to be asked")
            assert found.dtype == torch.int32
            assert found.tolist() == expected
            assert torch.equal(given.nan_to_num(7.0), before.nan_to_num(7.0))

    def test_a_row_does_not_depend_on_the_batch(self, sampler_class: type[Sampler]) -> None:
        """The same row gives the same token alone, in any batch and at any place.

        If it fails: draw from a counter-based generator keyed by seed and position, not from one that the batch shares.
        """
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.num_rows, 500, generator=generator) * 2
        rows = [
            RowParams((0.0, 0.8, 1.3)[i % 3], (0, 20)[i % 2], (1.0, 0.9)[i // 2 % 2], (0.0, 0.02)[i // 4 % 2], i, 7 * i)
            for i in range(self.num_rows)
        ]
        together = self.sample(sampler_class, logits, rows)
        alone = [self.sample(sampler_class, logits[i : i + 1], [rows[i]])[0] for i in range(self.num_rows)]
        backwards = self.sample(sampler_class, logits.flip(0), rows[::-1])[::-1]
        assert together == alone == backwards

    def test_seed_and_position_decide(self, sampler_class: type[Sampler]) -> None:
        """Equal seeds and positions draw equally; other seeds or positions draw otherwise.

        If it fails: key the generator by both.
        """
        logits = torch.zeros(1, 1000)

        def draw(seed: int, position: int) -> int:
            return self.sample(sampler_class, logits, [RowParams(seed=seed, position=position)])[0]

        assert draw(1, 1) == draw(1, 1)
        assert len({draw(seed, 1) for seed in range(30)}) > 20
        assert len({draw(1, position) for position in range(30)}) > 20

    def test_large_vocabulary_and_extreme_logits(self, sampler_class: type[Sampler]) -> None:
        """Forbidden tokens (minus infinity) are never drawn, and huge logits do not overflow.

        If it fails: subtract the maximum before exp, and search a cumulative sum strictly, so that a weight of 0 is
        passed over.
        """
        logits = torch.full((self.num_rows, 50_000), float("-inf"))
        logits[:, [7, 49_999]] = torch.tensor([3.0e38, 3.0e38])
        drawn = self.sample(sampler_class, logits, [RowParams(temperature=0.5, seed=i) for i in range(self.num_rows)])
        assert set(drawn) == {7, 49_999}
