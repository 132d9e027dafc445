"""Checks of what an attention backend may promise beyond right results: fusion, graphs, determinism."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.contract.attention import KV_DTYPES, AttentionBackend, GraphSupport, QKVStep
from quire.testing.attention_harness import AttentionHarness
from quire.testing.attention_problems import CASES, LAYERS, Problem, make_layer, make_step
from quire.testing.batches import make_batch
from quire.testing.placement import placed


class AttentionPromises(AttentionHarness):
    """Each is skipped for a backend that does not make the promise."""

    @pytest.mark.parametrize("style", ["neox", "gptj"])
    @pytest.mark.parametrize("rotary_dim", [0, 16, 32])
    @pytest.mark.parametrize("norms", ["none", "both", "offset", "unlike", "one"])
    def test_prepare_qkv_equals_the_composition(
        self, backend_class: type[AttentionBackend], norms: str, rotary_dim: int, style: Any
    ) -> None:
        """A fused `prepare_qkv` gives what the default composition gives, in the results and in the cache: whole, half
        and no rotation; norms on both, one or none of q and k, with Gemma's offset, or with unlike eps.

        If it fails: where the fused form cannot do one of these, call `super().prepare_qkv(step)`.
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

    @pytest.mark.parametrize("kv_dtype", sorted(KV_DTYPES))
    def test_prepare_qkv_fills_every_cache(self, backend_class: type[AttentionBackend], kv_dtype: str) -> None:
        """Into a cache of a declared dtype a fused `prepare_qkv` rounds as `write_kv` does, and stays within its range.

        If it fails: divide by `layer.cache_scales`, limit what is written to the dtype's range before it is rounded, to
        the nearest and to even; in int8, multiply by 127 / the head's largest, and store the largest / 127 as its
        scale.
        """
        if kv_dtype not in backend_class.caps.kv_dtypes:
            pytest.skip(f"does not declare the cache dtype {kv_dtype!r}")
        layer = dataclasses.replace(make_layer("gqa"), k_scale=0.3, v_scale=3.0)
        backend = self.make(backend_class, layer, torch.float32, 16, kv_dtype=kv_dtype)
        step = make_step(backend, CASES["mixed"], torch.float32, norms="both", rotary_dim=32)
        step.qkv[0] *= 1e4  # values are not normed
        step = placed(step, self.device)
        caches = []
        for prepare, one in _both_ways(backend_class, step):
            prepare(backend, one)
            caches.append(torch.cat([cache.float().flatten() for cache in one.kv]))
        composed, fused = caches
        assert torch.isfinite(fused).all()
        assert (composed == fused).float().mean() > 0.99
        step_size = 1.0 if kv_dtype == "int8" else 2**-9
        torch.testing.assert_close(
            fused, composed, atol=step_size, rtol=0.13
        )  # one step of the coarser number, at most

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_deterministic_prepare_qkv(self, backend_class: type[AttentionBackend], dtype: torch.dtype) -> None:
        """A token's q, k and v have the same bits whichever tokens are prepared with it.

        If it fails: use kernels whose order of summation does not depend on how many tokens there are
        (`quire.plugin.elementwise` for elementwise functions), or declare `deterministic=False`.
        """
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

    def test_plan_is_graph_safe(self, backend_class: type[AttentionBackend]) -> None:
        """For one graph key, plan returns the same addresses, shapes and Python scalars every time.

        If it fails: allocate in the constructor what the plan fills, of the largest size, and write into it; let
        scalars follow from the key and `max_seq_len` alone; or declare less in `caps.graph`.
        """
        if backend_class.caps.graph is GraphSupport.NEVER:
            pytest.skip("declares no graph support")
        backend = self.make(backend_class, make_layer("gqa"), torch.float32, 16)
        first = dataclasses.replace(make_batch([1] * 4, [5, 16, 31, 0]).batch, max_seq_len=128)
        first, second = placed((first, make_batch([1] * 4, [3, 20, 2, 9]).batch), self.device)
        before = list(_signature(backend.plan(first)))
        for name in ("query_start_loc", "seq_lens", "slot_mapping", "query_start_loc_host", "seq_lens_host"):
            getattr(first, name).copy_(getattr(second, name))
        assert list(_signature(backend.plan(first))) == before

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("layer", ["gqa", "window", "sinks"])
    def test_a_captured_plan_serves_later_steps(
        self, backend_class: type[AttentionBackend], layer: str, count: int
    ) -> None:
        """What a graph captured with one step's plan is right for a later step of the same key, once that is planned.

        If it fails: the plan is stale. Whatever `forward` reads of it must lie where the last call of `plan` wrote, and
        the rest follow from the graph's key.
        """
        if backend_class.caps.graph is GraphSupport.NEVER:
            pytest.skip("declares no graph support")
        backend = self.make(backend_class, make_layer(layer), torch.float32, 16)
        first, second = (
            Problem.make(make_layer(layer), ([count] * 4, contexts), torch.float32, seed=seed)
            for seed, contexts in enumerate(([4, 15, 29, 0], [3, 20, 2, 9]))
        )
        self._serve_later(backend, first, second)

    @pytest.mark.parametrize("layer", ["gqa", "window", "sinks"])
    def test_a_captured_plan_serves_other_mixes(self, backend_class: type[AttentionBackend], layer: str) -> None:
        """What a graph captured with padding alone is right for any step of its size, decode and prefill rows mixed.

        If it fails: a launch, its grid or a scalar depends on which rows are decode rows. Decide that on the device,
        from `query_start_loc`, or declare UNIFORM in `caps.graph`.
        """
        if backend_class.caps.graph is not GraphSupport.ANY:
            pytest.skip("does not declare graphs of mixed steps")
        backend = self.make(backend_class, make_layer(layer), torch.float32, 16)
        first = Problem.make(make_layer(layer), ([0], [0]), torch.float32, padding=(4, 24))
        for query_lens, contexts in (([1, 9, 1, 6], [30, 0, 7, 20]), ([1, 1, 2], [5, 40, 0]), ([24], [3])):
            padding = (5 - len(query_lens), 24 - sum(query_lens))
            later = Problem.make(make_layer(layer), (query_lens, contexts), torch.float32, padding=padding)
            self._serve_later(backend, first, later)

    def _serve_later(self, backend: AttentionBackend, first: Problem, second: Problem) -> None:
        """Plan the first step as for a graph, then the second at the same addresses; attend by the first one's plan."""
        batch = first.case.batch
        is_mixed = not second.case.batch.uniform_query_len or first.query_lens == [0]
        batch = dataclasses.replace(
            batch,
            uniform_query_len=0 if is_mixed else batch.uniform_query_len,
            max_query_len=batch.num_tokens,
            max_seq_len=128,
            block_table=torch.zeros(batch.num_reqs, 8, dtype=torch.int32),
        )
        static = placed(batch, self.device)
        captured = backend.plan(static)
        problem = placed(second, self.device)
        for field in dataclasses.fields(static):
            if field.name != "block_table" and isinstance(value := getattr(static, field.name), Tensor):
                value.copy_(getattr(problem.case.batch, field.name))
        blocks = problem.case.batch.block_table
        static.block_table.zero_()[:, : blocks.shape[1]] = blocks
        caches, (k, v) = problem.fill(backend, float("nan")), problem.new_kv()
        backend.write_kv(problem.layer, k, v, caches, static)
        backend.plan(static)
        out = problem.q.new_full((static.num_tokens, problem.layer.num_heads, problem.layer.v_head_dim), float("nan"))
        backend.forward(problem.layer, problem.q, k, v, caches, static, captured, out)
        assert torch.isfinite(out).all(), "the result must be finite, padding included"
        exact = torch.cat(second.expected(backend))
        torch.testing.assert_close(
            out[: len(exact)].cpu().double(), exact, atol=self.tolerance[torch.float32], rtol=1e-4
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layer", LAYERS)
    def test_deterministic_over_batches_and_chunks(
        self, backend_class: type[AttentionBackend], layer: str, dtype: torch.dtype
    ) -> None:
        """A token's result has the same bits alone, in a batch, and in chunks of any size.

        If it fails: fix the tiles by absolute position, so that the order of summation depends on nothing else, or
        declare `deterministic=False`.
        """
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
