"""Runs an attention backend on a problem, and checks what any call of it must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, AttentionInit, AttentionLayer
from quire.testing.attention_problems import TOLERANCE, Problem
from quire.testing.placement import placed

MAX_ROWS = 16
"""Rows that every backend here is told to expect."""


class AttentionHarness:
    """What the checks of attention share."""

    device = "cpu"
    tolerance = TOLERANCE
    options: Any = None
    """The instance of `Provider.options` to construct it with, or None."""

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
        init = AttentionInit(torch.device(self.device), dtype, layers, block_size, MAX_ROWS, 512, 64, deterministic)
        backend = backend_class(replace(init, options=self.options, kv_dtype=kv_dtype))
        assert hasattr(backend, "init"), "`__init__` must call super().__init__(init)"
        return backend

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
        answer: object = backend.forward(layer, problem.q, k, v, caches, batch, backend.plan(batch), out)
        assert answer is None, f"forward returned a {type(answer).__name__}; it must write into `out` and return None"
        assert not out.isnan().all(), "forward wrote nothing into `out`"
        for cache, old in zip(caches, written, strict=True):
            assert torch.isclose(cache.float(), old.float(), rtol=0, atol=0, equal_nan=True).all(), "forward wrote KV"
        assert torch.isfinite(out).all(), "the result must be finite, padding included"
        return out.cpu()

    def check(
        self, backend_class: type[AttentionBackend], problem: Problem, *, added: float = 0.0, **options: Any
    ) -> Tensor:
        """Run, and compare every row with the oracle. `added`: to the tolerances of the dtype and of the caps."""
        out = self.run(backend_class, problem, **options)
        tolerance = self.tolerance[problem.q.dtype] + backend_class.caps.kv_tolerance + added
        backend = self.make(backend_class, problem.layer, problem.q.dtype, problem.case.batch.block_size)
        start = 0
        for count, exact in zip(problem.query_lens, problem.expected(backend), strict=True):
            torch.testing.assert_close(out[start : start + count].double(), exact, atol=tolerance, rtol=tolerance)
            start += count
        return out
