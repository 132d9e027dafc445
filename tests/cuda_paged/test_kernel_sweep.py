"""The kernels' benchmark, as far as it goes without a GPU: what is measured, against which limit, and that it runs."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "cuda_attention.py"


@pytest.fixture(scope="module")
def sweep():
    import sys

    spec = importlib.util.spec_from_file_location("cuda_attention", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_attention"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cuda_attention"]


@pytest.fixture(scope="module")
def small(sweep):
    return sweep.Model(4, 2, 16, 32, 48, 300, 16, torch.float32)


def test_the_sweep_has_every_point(sweep):
    points = list(sweep.sweep(quick=False))
    decodes = {(p.rows, p.context, p.kv_dtype) for p in points if p.query_len == 1}
    contexts = (1024, 4096, 16_384)
    assert decodes == {(b, c, k) for b in (1, 8, 64, 256) for c in contexts for k in ("auto", "fp8_e4m3")}
    assert [p.context for p in points if p.is_prefill] == [512, 2048, 8192]
    assert set(sweep.sweep(quick=True)) <= set(points)
    assert max(Counter(p.name for p in points).values()) == 1


def test_limits_are_counted_from_the_shapes(sweep):
    model = sweep.Model()
    assert sweep.Point(64, 1, 1024).kv_bytes(model) == 64 * 1024 * 8 * 128 * 2 * 2
    assert sweep.Point(64, 1, 1024, "fp8_e4m3").kv_bytes(model) == 64 * 1024 * 8 * 128 * 2
    # Each query meets itself and all before it, in two products of `head_dim` multiplications and additions.
    for rows, query_len, context in ((1, 7, 7), (3, 2, 9), (2, 1, 5)):
        pairs = sum(context - query_len + i + 1 for i in range(query_len))
        assert sweep.Point(rows, query_len, context).operations(model) == rows * pairs * 32 * 128 * 4


def test_attention_is_measured_and_a_library_that_is_missing_says_so(sweep, small):
    def once(work):
        work()
        return 0.5

    points = (sweep.Point(2, 1, 40), sweep.Point(1, 20, 20), sweep.Point(2, 1, 40, "fp8_e4m3"))
    rows = {row["what"]: row for row in sweep.attention_rows(small, iter(points), "cpu", once, 1000.0, 1e6)}
    assert rows["decode 2 x 40"] == {"what": "decode 2 x 40", "us": 5e5, "of copy": points[0].kv_bytes(small) / 500}
    assert rows["prefill 1 x 20"]["of matmul"] == points[1].operations(small) / 0.5e6
    assert rows["decode 2 x 40 fp8_e4m3"]["of copy"] * 4 == rows["decode 2 x 40"]["of copy"]
    assert rows["decode 2 x 40 flash attention 3"]["reason"].startswith("ModuleNotFoundError")
    assert "decode 2 x 40 torch varlen" in rows
    for row in rows.values():
        assert sweep.shown(row).startswith(row["what"])


def test_what_stands_around_attention_runs(sweep, small):
    works = [item for item in sweep.op_work(small, "cpu") if item[0].endswith(" 1")]
    works += [item for item in sweep.sampler_work(small, "cpu") if item[0].startswith("sample 1 ")]
    assert len(works) == 8
    for _, moved, work in works:
        work()
        assert moved > 0
