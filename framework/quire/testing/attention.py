"""Conformance of attention backends, against an oracle in float64 that shares no code with any of them.

What a backend does not declare in its caps is skipped; what it declares and gets wrong is a failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.contract.attention import (
    AttentionBackend,
    AttentionInit,
    AttentionLayer,
    GraphSupport,
    HeadNorm,
    KVCaches,
    QKVStep,
)
from quire.testing.batches import BatchCase, make_batch

CASES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "prefill": ([7, 1, 19], [0, 0, 0]),
    "decode": ([1, 1, 1, 1, 1], [5, 16, 31, 0, 70]),
    "chunked": ([6, 9], [10, 33]),
    "mixed": ([1, 8, 1, 17], [40, 0, 15, 4]),
    "verification": ([3, 3, 3], [12, 29, 1]),
}
LAYERS: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "gqa": {"num_heads": 6, "num_kv_heads": 2},
    "mqa": {"num_heads": 4, "num_kv_heads": 1},
    "window": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 9},
    "softcap": {"num_heads": 4, "num_kv_heads": 2, "logit_softcap": 2.0},
    "sinks": {"num_heads": 4, "num_kv_heads": 2, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window and sinks": {"num_heads": 2, "num_kv_heads": 1, "sliding_window": 5, "sinks": torch.tensor([1.0, 0.0])},
    "other v size": {"num_heads": 4, "num_kv_heads": 2, "v_head_dim": 16},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest absolute error for values of order one, by dtype."""


def make_layer(name: str, head_dim: int = 32) -> AttentionLayer:
    """A layer of the table."""
    fields: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": head_dim, "scale": head_dim**-0.5} | LAYERS[name]
    return AttentionLayer(layer_id=0, **fields)


def oracle(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one request in float64: q [q, Hq, D] are the last of k [n, Hkv, D], v [n, Hkv, Dv]."""
    count, length = q.shape[0], k.shape[0]
    out = torch.empty(count, layer.num_heads, layer.v_head_dim, dtype=torch.float64)
    group = layer.num_heads // layer.num_kv_heads
    for head in range(layer.num_heads):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        for row in range(count):
            position = length - count + row
            first = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
            scores = keys[first : position + 1] @ q[row, head].double() * layer.scale
            if layer.logit_softcap is not None:
                scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
            weights = scores.exp()
            total = weights.sum() + (layer.sinks[head].double().exp() if layer.sinks is not None else 0.0)
            out[row, head] = (weights / total) @ values[first : position + 1]
    return out


@dataclass
class Problem:
    """A batch with its tensors: each row's keys and values, and the queries of its new tokens."""

    layer: AttentionLayer
    case: BatchCase
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def make(
        cls,
        layer: AttentionLayer,
        lens: tuple[Sequence[int], Sequence[int]],
        dtype: torch.dtype,
        *,
        block_size: int = 16,
        seed: int = 0,
        padding: tuple[int, int] = (0, 0),
    ) -> Problem:
        query_lens, context_lens = lens
        case = make_batch(
            query_lens, context_lens, block_size=block_size, pad_reqs=padding[0], pad_tokens=padding[1], seed=seed
        )
        generator = torch.Generator().manual_seed(seed + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        totals = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
        return cls(
            layer,
            case,
            query_lens,
            context_lens,
            draw(case.batch.num_tokens, layer.num_heads, layer.head_dim),
            [draw(total, layer.num_kv_heads, layer.head_dim) for total in totals],
            [draw(total, layer.num_kv_heads, layer.v_head_dim) for total in totals],
        )

    def new_kv(self) -> tuple[Tensor, Tensor]:
        """k and v of this step's tokens, padding included."""
        padding = self.case.batch.num_tokens - sum(self.query_lens)
        pieces = []
        for rows in (self.keys, self.values):
            parts = [row[context:] for row, context in zip(rows, self.context_lens, strict=True)]
            pieces.append(torch.cat([*parts, rows[0].new_ones(padding, *rows[0].shape[1:])]))
        return pieces[0], pieces[1]

    def fill(self, backend: AttentionBackend, poison: float) -> KVCaches:
        """Caches that hold the rows' contexts; every slot that nobody owns holds `poison`."""
        specs = backend.kv_spec(self.layer, self.case.batch.block_size, self.q.dtype)
        caches = tuple(torch.full((self.case.num_blocks, *spec.shape), poison).to(spec.dtype) for spec in specs)
        for cache in caches:
            cache[0].zero_()
        for row, context in enumerate(self.context_lens):
            if context:
                batch = dataclasses.replace(self.case.batch, slot_mapping=self.case.slots(row, context))
                backend.write_kv(self.layer, self.keys[row][:context], self.values[row][:context], caches, batch)
        return caches

    def expected(self) -> list[Tensor]:
        """The oracle's result per row."""
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).tolist()
        return [
            oracle(self.layer, self.q[start : start + count], k, v)
            for start, count, k, v in zip(starts, self.query_lens, self.keys, self.values, strict=False)
        ]


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
    ) -> AttentionBackend:
        reasons = backend_class.supports(layer, dtype, self.device, block_size)
        if reasons:
            pytest.skip("; ".join(reasons))
        init = AttentionInit(torch.device(self.device), dtype, (layer,), block_size, 16, 512, 64, deterministic)
        return backend_class(init)

    def run(
        self,
        backend_class: type[AttentionBackend],
        problem: Problem,
        *,
        poison: float = float("nan"),
        deterministic: bool = False,
    ) -> Tensor:
        """Write the step's KV, attend, and check what may be written."""
        batch, layer = problem.case.batch, problem.layer
        backend = self.make(backend_class, layer, problem.q.dtype, batch.block_size, deterministic=deterministic)
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
        out = torch.full((batch.num_tokens, layer.num_heads, layer.v_head_dim), float("nan")).to(problem.q.dtype)
        backend.forward(layer, problem.q, k, v, caches, batch, backend.plan(batch), out)
        for cache, old in zip(caches, written, strict=True):
            assert torch.isclose(cache.float(), old.float(), rtol=0, atol=0, equal_nan=True).all(), "forward wrote KV"
        assert torch.isfinite(out).all(), "the result must be finite, padding included"
        return out

    def check(self, backend_class: type[AttentionBackend], problem: Problem, **options: Any) -> Tensor:
        """Run, and compare every row with the oracle."""
        out = self.run(backend_class, problem, **options)
        tolerance = self.tolerance[problem.q.dtype] + backend_class.caps.kv_tolerance
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

    def test_long_context(self, backend_class: type[AttentionBackend]) -> None:
        """Hundreds of tokens, where an error of a single position would drown in small cases."""
        lens = ([1, 40, 1], [500, 300, 129])
        self.check(backend_class, Problem.make(make_layer("gqa"), lens, torch.float32))

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
    @pytest.mark.parametrize("norm", [None, 0.0, 1.0])
    def test_prepare_qkv_equals_the_composition(
        self, backend_class: type[AttentionBackend], style: Any, norm: float | None
    ) -> None:
        """A fused `prepare_qkv` gives what the default composition gives, in the results and in the cache."""
        layer, case = make_layer("gqa"), make_batch(*CASES["mixed"])
        backend = self.make(backend_class, layer, torch.float32, 16)
        generator = torch.Generator().manual_seed(0)
        tokens, width = case.batch.num_tokens, (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
        weight = torch.rand(layer.head_dim, generator=generator)
        head_norm = None if norm is None else HeadNorm(weight, 1e-6, norm)
        angles = torch.randn(tokens, layer.head_dim // 4, generator=generator)  # half of each head turns
        results = []
        qkv = torch.randn(tokens, width, generator=generator)
        for prepare in (AttentionBackend.prepare_qkv, backend_class.prepare_qkv):
            specs = backend.kv_spec(layer, 16, torch.float32)
            kv = tuple(torch.zeros(case.num_blocks, *spec.shape, dtype=spec.dtype) for spec in specs)
            step = QKVStep(layer, qkv.clone(), angles.cos(), angles.sin(), kv, case.batch, style, head_norm, head_norm)
            results.append((*prepare(backend, step), *kv))
        for composed, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, composed, atol=1e-5, rtol=1e-5)

    def test_plan_is_graph_safe(self, backend_class: type[AttentionBackend]) -> None:
        """For one graph key, plan returns the same addresses, shapes and Python scalars every time."""
        if backend_class.caps.graph is GraphSupport.NEVER:
            pytest.skip("declares no graph support")
        backend = self.make(backend_class, make_layer("gqa"), torch.float32, 16)
        first = dataclasses.replace(make_batch([1] * 4, [5, 16, 31, 0]).batch, max_seq_len=128)
        second = make_batch([1] * 4, [3, 20, 2, 9]).batch
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
