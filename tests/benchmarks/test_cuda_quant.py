"""What the benchmark of quantized products plans, as far as a machine without a GPU can tell."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from quire_quant.cuda_words import unit_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_quant.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("cuda_quant", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_bf16_is_measured_before_what_is_compared_with_it(benchmark):
    order = [(shape.name, method.name) for shape, method in benchmark.plan(quick=False)]
    assert len(order) == len(set(order)) == len(benchmark.SHAPES) * len(benchmark.METHODS)
    methods = len(benchmark.METHODS)
    assert all(name == "bf16" for _, name in order[::methods])
    assert all(len({shape for shape, _ in order[at : at + methods]}) == 1 for at in range(0, len(order), methods))
    quick = list(benchmark.plan(quick=True))
    assert 0 < len(quick) < len(order)


def test_all_methods_serve_all_shapes(benchmark):
    for shape in benchmark.SHAPES:
        assert unit_of(benchmark.GROUP, shape.inputs) == benchmark.GROUP
        assert shape.inputs % 128 == shape.outputs % 8 == 0, "torch's int4 operation"


def test_bytes_are_those_of_weight_input_and_result(benchmark):
    shape = benchmark.Shape("", 4096, 1024)
    assert benchmark.moved_bytes(shape, 3, 16.0) == 2 * (4096 * 1024 + 3 * 4096 + 3 * 1024)
    # a scale of 16 bits and a zero point of 8 for every 128 codes
    ours = next(method for method in benchmark.METHODS if method.name == "int4 ours")
    assert benchmark.moved_bytes(shape, 0, ours.bits) == 4096 * 1024 / 2 + 4096 * 1024 / 128 * 3


def test_rings_are_larger_than_caches(benchmark):
    for shape, method in benchmark.plan(quick=False):
        count = benchmark.ring_size(shape, method.bits)
        assert count >= 2
        assert count * benchmark.moved_bytes(shape, 0, method.bits) >= benchmark.RING_BYTES


def test_the_copy_is_measured_first(benchmark, monkeypatch):
    """Once the copy's function was called without what measures it."""

    def copy_bandwidth(time):
        return 2e9 / time(None)

    monkeypatch.setitem(
        sys.modules, "cuda_attention", SimpleNamespace(copy_bandwidth=copy_bandwidth, seconds=lambda work: 2)
    )
    assert next(benchmark.measurements(quick=True)) == {"what": "copy", "GB/s": 1.0}
