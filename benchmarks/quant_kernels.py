"""Times every operation that multiplies by integer codes here, beside the unquantized layer of the same size.

    python benchmarks/quant_kernels.py [--threads 1] [--bits 4] [--group-size 128]

Shapes are those of a 0.6B and an 8B model. Each line is one shape and number of rows, measured in turn within one
process; figures are times faster than the unquantized layer in bfloat16, and on a shared machine only these ratios
mean something. Weights are cycled through so that they come from memory, as in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from quire.plugin import LinearSpec, OpInit, QuantLinearSpec
from quire.registry import HostOptions, PluginHost, build_host
from torch import Tensor

SHAPES = {"0.6B qkv": (1024, 4096), "0.6B down": (3072, 1024), "8B o": (4096, 4096)}
ROWS = (1, 4, 16, 128)
COLD_BYTES = 100_000_000
CPU = torch.device("cpu")
Run = Callable[[Tensor], object]


def race(functions: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds of each, taken in turn: the tenth part of its calls that was fastest says how long one takes."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 10 or time.perf_counter() < end:
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[index].append(time.perf_counter() - start)
    return [sorted(each)[len(each) // 10] for each in times]


def op_sets(host: PluginHost, kind: str) -> dict[str, Any]:
    """The op sets that serve a kind here, highest priority first."""
    found = {}
    for provider, plugin in host.providers("op"):
        if not host.availability(provider) and (not provider.devices or "cpu" in provider.devices):
            op_set = host.load("op", f"{plugin}:{provider.name}")(OpInit(CPU, 256))
            if kind in op_set.kinds:
                found[provider.name] = op_set
    return found


def copies(make: Callable[[], Any], op: Any, num_bytes: int) -> Run:
    """An operation over as many packed weights as do not fit the cache, one after the other."""
    states = cycle([make() for _ in range(max(2, COLD_BYTES // num_bytes))])
    return lambda x: op(x, next(states))


def candidates(host: PluginHost, inputs: int, outputs: int, bits: int, group_size: int) -> dict[str, Run]:
    """Name -> what multiplies; the unquantized layer first."""
    generator = torch.Generator().manual_seed(0)
    plain = LinearSpec(inputs, outputs, False, torch.bfloat16)
    dense = next(op for op in op_sets(host, "linear").values() if not op.why_not(plain)).build(plain)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    runs = {"bfloat16": copies(lambda: dense.pack(weight.clone(), None), dense, 2 * inputs * outputs)}
    spec = QuantLinearSpec(inputs, outputs, bits, group_size, "integer", torch.bfloat16)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator).to(torch.uint8)
    scales = torch.rand(outputs, inputs // group_size, generator=generator) / 100
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator).float()
    for name, op_set in op_sets(host, "quant_linear").items():
        reasons = op_set.why_not(spec)
        if reasons:
            print(f"{name} does not serve {inputs} x {outputs}: {'; '.join(reasons)}")
            continue
        op = op_set.build(spec)
        runs[name] = copies(partial(op.pack, codes, scales, zeros), op, inputs * outputs * bits // 8)
    return runs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    host = build_host(HostOptions())
    for shape, (inputs, outputs) in SHAPES.items():
        runs = candidates(host, inputs, outputs, options.bits, options.group_size)
        for rows in ROWS:
            x = torch.randn(rows, inputs).bfloat16()
            with torch.inference_mode():
                taken = race([partial(run, x) for run in runs.values()], options.seconds)
            ratios = [f"{name} {taken[0] / seconds:.2f}" for name, seconds in zip(runs, taken, strict=True)]
            print(
                f"{shape:10} rows {rows:4}   {'   '.join(ratios[1:])}   (bfloat16 {taken[0] * 1e6:.0f} us)", flush=True
            )


if __name__ == "__main__":
    main()
