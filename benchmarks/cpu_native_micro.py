"""Times cpu_native's multiplications beside torch's, in turn, on one thread, in processor time.

    python benchmarks/cpu_native_micro.py

Processor time of one thread means something on a busy machine too, where a wall clock does not. Weights rotate over
more memory than the caches hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from quire.plugin import LinearSpec, OpInit, QuantLinearSpec
from quire.testing.op import quantized
from quire_cpu_native.ops import NativeOps
from quire_cpu_ref.ops import TorchOps

INPUTS, OUTPUTS, WEIGHTS = 1024, 6144, 12
ROWS = (1, 4, 32, 256)
ROUNDS = 15


def best(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least seconds of processor time of each call, made in turn."""
    times: dict[str, float] = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            times[name] = min(times[name], time.thread_time() - start)
    return times


def plain(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The same weights in both op sets."""
    spec, init = LinearSpec(INPUTS, OUTPUTS, False, dtype), OpInit(torch.device("cpu"), 256)
    weights = [torch.randn(OUTPUTS, INPUTS).to(dtype) for _ in range(WEIGHTS)]
    calls = {}
    for name, op_set in (("native", NativeOps(init)), ("torch", TorchOps(init))):
        op = op_set.build(spec)
        states = cycle([op.pack(weight.clone(), None) for weight in weights])
        calls[name] = lambda x, op=op, states=states: op(x, next(states))
    return calls


def codes(bits: int, dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Codes in groups of 32, native alone."""
    spec = QuantLinearSpec(INPUTS, OUTPUTS, bits, 32, "middle", dtype)
    op = NativeOps(OpInit(torch.device("cpu"), 256)).build(spec)
    states = cycle([op.pack(*quantized(spec, torch.Generator().manual_seed(i))) for i in range(WEIGHTS)])
    return {f"int{bits}": lambda x: op(x, next(states))}


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        calls = plain(dtype) | codes(4, dtype) | codes(8, dtype)
        for rows in ROWS:
            x = torch.randn(rows, INPUTS).to(dtype)
            times = best({name: partial(call, x) for name, call in calls.items()})
            flops = 2 * rows * INPUTS * OUTPUTS
            cells = "  ".join(f"{name} {s * 1e3:8.2f} ms {flops / s / 1e9:6.1f} GFLOP/s" for name, s in times.items())
            print(f"{str(dtype)[6:]:9} {rows:4} rows  {cells}", flush=True)


if __name__ == "__main__":
    main()
