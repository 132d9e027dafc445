"""Conformance of attention backends, against the oracle of `attention_problems`.

What a backend does not declare in its caps is skipped; what it declares and gets wrong is a failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.contract.attention import (
    KV_DTYPES,
    AttentionBackend,
    AttentionInit,
    AttentionLayer,
    GraphSupport,
    QKVStep,
)
from quire.testing.attention_problems import CASES, LAYERS, TOLERANCE, Problem, make_layer, make_step
from quire.testing.batches import make_batch
from quire.testing.placement import placed

LONG: tuple[tuple[Sequence[int], Sequence[int]], ...] = (
    ([1, 40, 1], [500, 300, 129]),
    ([1, 1, 1, 1], [517, 300, 129, 77]),
    ([3, 3], [601, 66]),
)
"""New tokens and context of each row, where contexts are long."""


class AttentionConformance:
    """What every attention backend must hold. Subclass, and give the fixture `backend_class`."""

    device = "cpu"
    tolerance = TOLERANCE

    @pytest.fixture
    def backend_class(self) -> type[AttentionBackend]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `backend_class`")

    def make(
        self,
        backend_class: type[AttentionBackend],
        layer: AttentionLayer,
        dtype: torch.dtype,
        block_size: int,
        *,
        deterministic: bool = False,
        kv_dtype: str = "auto",
    ) -> AttentionBackend:
        reasons = backend_class.supports(layer, dtype, self.device, block_size)
        if reasons:
            pytest.skip("; ".join(reasons))
        layers = (placed(layer, self.device),)
        init = AttentionInit(torch.device(self.device), dtype, layers, block_size, 16, 512, 64, deterministic)
        return backend_class(dataclasses.replace(init, kv_dtype=kv_dtype))

    def run(
        self,
        backend_class: type[AttentionBackend],
        problem: Problem,
        *,
        poison: float = float("nan"),
        deterministic: bool = False,
        kv_dtype: str = "auto",
    ) -> Tensor:
        """Write the step's KV, attend, and check what may be written; the result on the CPU."""
        problem = placed(problem, self.device)
        batch, layer = problem.case.batch, problem.layer
        options: Any = {"deterministic": deterministic, "kv_dtype": kv_dtype}
        backend = self.make(backend_class, layer, problem.q.dtype, batch.block_size, **options)
        caches = problem.fill(backend, poison)
        k, v = problem.new_kv()
        before = [cache.clone() for cache in caches]
        backend.write_kv(layer, k, v, caches, batch)
        touched = batch.slot_mapping
        for cache, old in zip(caches, before, strict=True):
            same = torch.isclose(cache.float(), old.float(), rtol=0, atol=0, equal_nan=True)
            same = same.flatten(2).all(-1).flatten()
            same[touched] = True
            assert same.all(), "write_kv changed a slot that is not in slot_mapping"
        written = [cache.clone() for cache in caches]
        out = problem.q.new_full((batch.num_tokens, layer.num_heads, layer.v_head_dim), float("nan"))
        backend.forward(layer, problem.q, k, v, caches, batch, backend.plan(batch), out)
        for cache, old in zip(caches, written, strict=True):
            assert torch.isclose(cache.float(), old.float(), rtol=0, atol=0, equal_nan=True).all(), "forward wrote KV"
        assert torch.isfinite(out).all(), "the result must be finite, padding included"
        return out.cpu()

    def check(
        self, backend_class: type[AttentionBackend], problem: Problem, *, added: float = 0.0, **options: Any
    ) -> Tensor:
        """Run, and compare every row with the oracle. `added`: to the tolerance of the dtype."""
        out = self.run(backend_class, problem, **options)
        tolerance = self.tolerance[problem.q.dtype] + added
        start = 0
        for count, exact in zip(problem.query_lens, problem.expected(), strict=True):
            torch.testing.assert_close(out[start : start + count].double(), exact, atol=tolerance, rtol=tolerance)
            start += count
        return out

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("layer", LAYERS)
    def test_equals_the_oracle(self, backend_class: type[AttentionBackend], layer: str, case: str) -> None:
        """Every feature in every kind of batch, in float32, with NaN in all slots that nobody owns.

        If only `window` fails, remember that a query sees itself and sliding_window - 1 before it. If
        `decode` fails and `prefill` does not, look at the position formula seq_len - query_len + j.
        """
        self.check(backend_class, Problem.make(make_layer(layer), CASES[case], torch.float32))

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_dtypes(self, backend_class: type[AttentionBackend], dtype: torch.dtype) -> None:
        """Every declared dtype, within its own rounding."""
        for layer in ("gqa", "softcap"):
            self.check(backend_class, Problem.make(make_layer(layer), CASES["mixed"], dtype))

    @pytest.mark.parametrize("case", ["decode", "mixed"])
    @pytest.mark.parametrize("kv_dtype", sorted(KV_DTYPES))
    def test_kv_dtypes(self, backend_class: type[AttentionBackend], kv_dtype: str, case: str) -> None:
        """A declared cache dtype: exact for what it holds exactly, else within `kv_tolerance`; no overflow."""
        if kv_dtype not in backend_class.caps.kv_dtypes:
            pytest.skip(f"does not declare the cache dtype {kv_dtype!r}")
        for dtype in sorted(backend_class.caps.dtypes & set(self.tolerance), key=str):
            layer = make_layer("gqa")
            exact = Problem.make(layer, CASES[case], dtype, stored=KV_DTYPES[kv_dtype])
            self.check(backend_class, exact, kv_dtype=kv_dtype)
            rounded = Problem.make(layer, CASES[case], dtype)
            added = backend_class.caps.kv_tolerance
            assert 0 < added < 1, "a cache dtype needs a kv_tolerance that says something"
            self.check(backend_class, rounded, kv_dtype=kv_dtype, added=added)
            large = dataclasses.replace(rounded, values=[value * 3e3 for value in rounded.values])
            assert torch.isfinite(self.run(backend_class, large, kv_dtype=kv_dtype)).all()

    @pytest.mark.parametrize("kv_dtype", sorted(KV_DTYPES))
    def test_prepare_qkv_fills_every_cache(self, backend_class: type[AttentionBackend], kv_dtype: str) -> None:
        """Into a cache of a declared dtype a fused `prepare_qkv` rounds as `write_kv` does, within its range."""
        if kv_dtype not in backend_class.caps.kv_dtypes:
            pytest.skip(f"does not declare the cache dtype {kv_dtype!r}")
        backend = self.make(backend_class, make_layer("gqa"), torch.float32, 16, kv_dtype=kv_dtype)
        step = make_step(backend, CASES["mixed"], torch.float32, norms="both", rotary_dim=32)
        step.qkv[0] *= 1e4  # of the value nothing is normed
        step = placed(step, self.device)
        caches = []
        for prepare, one in _both_ways(backend_class, step):
            prepare(backend, one)
            caches.append(torch.cat([cache.float().flatten() for cache in one.kv]))
        assert torch.isfinite(caches[1]).all()
        assert (caches[0] == caches[1]).float().mean() > 0.99, (
            "more than what stands between two numbers is rounded otherwise"
        )
        torch.testing.assert_close(caches[1], caches[0], atol=2**-9, rtol=0.13)

    @pytest.mark.parametrize("block_size", [1, 3, 8, 32, 64])
    def test_block_sizes(self, backend_class: type[AttentionBackend], block_size: int) -> None:
        """Every block size that the caps admit."""
        self.check(backend_class, Problem.make(make_layer("gqa"), CASES["mixed"], torch.float32, block_size=block_size))

    @pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256])
    def test_head_sizes(self, backend_class: type[AttentionBackend], head_dim: int) -> None:
        """Every head size that the caps admit, odd ones too."""
        self.check(backend_class, Problem.make(make_layer("gqa", head_dim), CASES["mixed"], torch.float32))

    @pytest.mark.parametrize("case", ["decode", "mixed"])
    def test_padding(self, backend_class: type[AttentionBackend], case: str) -> None:
        """Padding rows and tokens change no real row, and come out finite."""
        layer = make_layer("gqa")
        plain = self.check(backend_class, Problem.make(layer, CASES[case], torch.float32))
        padded = Problem.make(layer, CASES[case], torch.float32, padding=(3, 5))
        count = plain.shape[0]
        torch.testing.assert_close(
            self.check(backend_class, padded)[:count].double(), torch.cat(padded.expected()), atol=2e-5, rtol=2e-5
        )

    def test_block_placement_does_not_matter(self, backend_class: type[AttentionBackend]) -> None:
        """The same problem over other blocks gives the same bits."""
        layer = make_layer("gqa")
        first = Problem.make(layer, CASES["mixed"], torch.float32, seed=1)
        second = dataclasses.replace(first, case=make_batch(*CASES["mixed"], seed=99))
        assert torch.equal(self.run(backend_class, first), self.run(backend_class, second))

    def test_repeatable(self, backend_class: type[AttentionBackend]) -> None:
        """The same call twice gives the same bits, whatever stale slots hold."""
        problem = Problem.make(make_layer("gqa"), CASES["mixed"], torch.float32)
        assert torch.equal(self.run(backend_class, problem), self.run(backend_class, problem, poison=1e4))

    @pytest.mark.parametrize("lens", LONG, ids=["mixed", "decode", "verification"])
    @pytest.mark.parametrize("layer", ["gqa", "window", "softcap", "sinks"])
    def test_long_context(
        self, backend_class: type[AttentionBackend], layer: str, lens: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        """Hundreds of tokens, where an error of a single position would drown in small cases.

        A backend that cuts a long context into parts and puts them together again does so here, in odd
        numbers: if only this fails, look at the last part, and at what must count once and not per part.
        """
        self.check(backend_class, Problem.make(make_layer(layer), lens, torch.float32))

    def test_any_shape(self, backend_class: type[AttentionBackend]) -> None:
        """Random lengths, heads, windows, block sizes."""
        rows = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=6)

        @given(
            rows=rows, layer=st.sampled_from(sorted(LAYERS)), size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99)
        )
        @settings(max_examples=40, deadline=None)
        def check(rows: list[tuple[int, int]], layer: str, size: int, seed: int) -> None:
            lens = ([row[0] for row in rows], [row[1] for row in rows])
            facts = make_layer(layer, 16 if layer == "other v size" else 8)
            if backend_class.supports(facts, torch.float32, self.device, size):
                return
            self.check(backend_class, Problem.make(facts, lens, torch.float32, block_size=size, seed=seed))

        check()

    @pytest.mark.parametrize("style", ["neox", "gptj"])
    @pytest.mark.parametrize("rotary_dim", [0, 16, 32])
    @pytest.mark.parametrize("norms", ["none", "both", "offset", "unlike", "one"])
    def test_prepare_qkv_equals_the_composition(
        self, backend_class: type[AttentionBackend], norms: str, rotary_dim: int, style: Any
    ) -> None:
        """A fused `prepare_qkv` gives what the default composition gives, in the results and in the cache.

        Whole, half and no rotation; norms on both, one or none of q and k, with Gemma's offset, or with
        unlike eps. Where the fused form cannot do one of these, call `super().prepare_qkv(step)`.
        """
        for name in ("gqa", "other v size"):
            layer = make_layer(name)
            if backend_class.supports(layer, torch.float32, self.device, 16):
                continue
            backend = self.make(backend_class, layer, torch.float32, 16)
            step = make_step(backend, CASES["mixed"], torch.float32, norms=norms, rotary_dim=rotary_dim, style=style)
            step = placed(step, self.device)
            results = [(*prepare(backend, one), *one.kv) for prepare, one in _both_ways(backend_class, step)]
            for composed, fused in zip(*results, strict=True):
                torch.testing.assert_close(fused, composed, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_deterministic_prepare_qkv(self, backend_class: type[AttentionBackend], dtype: torch.dtype) -> None:
        """A token's q, k and v have the same bits whichever tokens are prepared with it."""
        if not backend_class.caps.deterministic:
            pytest.skip("does not declare deterministic results")
        layer = make_layer("gqa")
        backend = self.make(backend_class, layer, dtype, 16, deterministic=True)
        whole = make_step(backend, ([45], [0]), dtype, norms="both", rotary_dim=layer.head_dim)
        whole = placed(whole, self.device)
        expected = backend.prepare_qkv(whole)
        for first, last in ((0, 1), (44, 45), (7, 10), (3, 40)):
            part = make_step(backend, ([last - first], [0]), dtype, norms="both", rotary_dim=layer.head_dim)
            part = placed(part, self.device)
            rows = slice(first, last)
            part = dataclasses.replace(
                whole,
                qkv=whole.qkv[rows].clone(),
                cos=whole.cos[rows],
                sin=whole.sin[rows],
                kv=part.kv,
                batch=part.batch,
            )
            for ours, exact in zip(backend.prepare_qkv(part), expected, strict=True):
                assert torch.equal(ours, exact[rows]), f"tokens {first} to {last - 1} differ when they stand alone"

    def test_values_of_neighbours_do_not_matter(self, backend_class: type[AttentionBackend]) -> None:
        """A row's bits do not change with what another request of the batch holds."""
        first = Problem.make(make_layer("gqa"), CASES["decode"], torch.float32)
        keys = [row if index == 2 else torch.full_like(row, 1e3) for index, row in enumerate(first.keys)]
        second = dataclasses.replace(first, keys=keys)
        assert torch.equal(self.run(backend_class, first)[2], self.run(backend_class, second)[2])

    def test_plan_is_graph_safe(self, backend_class: type[AttentionBackend]) -> None:
        """For one graph key, plan returns the same addresses, shapes and Python scalars every time."""
        if backend_class.caps.graph is GraphSupport.NEVER:
            pytest.skip("declares no graph support")
        backend = self.make(backend_class, make_layer("gqa"), torch.float32, 16)
        first = dataclasses.replace(make_batch([1] * 4, [5, 16, 31, 0]).batch, max_seq_len=128)
        first, second = placed((first, make_batch([1] * 4, [3, 20, 2, 9]).batch), self.device)
        before = list(_signature(backend.plan(first)))
        for name in ("query_start_loc", "seq_lens", "slot_mapping", "query_start_loc_host", "seq_lens_host"):
            getattr(first, name).copy_(getattr(second, name))
        assert list(_signature(backend.plan(first))) == before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layer", LAYERS)
    def test_deterministic_over_batches_and_chunks(
        self, backend_class: type[AttentionBackend], layer: str, dtype: torch.dtype
    ) -> None:
        """A token's result has the same bits alone, in a batch, and in chunks of any size."""
        if not backend_class.caps.deterministic:
            pytest.skip("does not declare deterministic results")
        facts = make_layer(layer)
        whole = Problem.make(facts, ([70, 33], [0, 0]), dtype, seed=4)
        exact = self.run(backend_class, whole, deterministic=True)
        for size in (1, 5, 16, 37):
            for row, (begin, length) in enumerate(((0, 70), (70, 33))):
                for first in range(0, length, size):
                    count = min(size, length - first)
                    part = Problem(
                        facts,
                        make_batch([count], [first], seed=size),
                        [count],
                        [first],
                        whole.q[begin + first : begin + first + count],
                        [whole.keys[row][: first + count]],
                        [whole.values[row][: first + count]],
                    )
                    ours = self.run(backend_class, part, deterministic=True)
                    assert torch.equal(ours, exact[begin + first : begin + first + count]), f"chunk {size} at {first}"


def _both_ways(backend_class: type[AttentionBackend], step: QKVStep) -> list[tuple[Any, QKVStep]]:
    """The composed and the fused function, each with a copy of the step to work on."""
    copies = [
        dataclasses.replace(step, qkv=step.qkv.clone(), kv=tuple(cache.clone() for cache in step.kv)) for _ in range(2)
    ]
    return list(zip((AttentionBackend.prepare_qkv, backend_class.prepare_qkv), copies, strict=True))


def _signature(plan: Any) -> Any:
    if isinstance(plan, Tensor):
        yield ("tensor", plan.data_ptr(), tuple(plan.shape), plan.dtype)
    elif dataclasses.is_dataclass(plan):
        for item in dataclasses.fields(plan):
            yield from _signature(getattr(plan, item.name))
    elif isinstance(plan, list | tuple):
        for value in plan:
            yield from _signature(value)
    elif isinstance(plan, dict):
        for value in plan.values():
            yield from _signature(value)
    else:
        yield ("python", plan)
