"""Products with quantized weights on a GPU, beside bfloat16 and torch's own int4 operation, under graph replay.

    python benchmarks/cuda_quant.py [--json FILE] [--quick]

For few rows the limit is the copy bandwidth that the same run measures: each row of the table gives the bytes that a
product has to read and write as a share of it. For many rows `x bf16`, the time of `F.linear` in bfloat16 over that
of the product, says more. Weights take turns in a ring that the cache does not hold, as layers of a model do.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quire.plugin import OpInit, QuantLinearSpec
from torch.nn import functional

ROWS = (1, 16, 64, 256, 1024, 4096)
GROUP = 128
RING_BYTES = 400 << 20
"""Bytes of weights in a ring: several times the level 2 cache of any GPU."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer of a model."""

    name: str
    inputs: int
    outputs: int


SHAPES = (
    Shape("Llama-3.1-8B qkv", 4096, 6144),
    Shape("Llama-3.1-8B o", 4096, 4096),
    Shape("Llama-3.1-8B gate up", 4096, 28672),
    Shape("Llama-3.1-8B down", 14336, 4096),
    Shape("Qwen3-0.6B qkv", 1024, 4096),
    Shape("Qwen3-0.6B o", 2048, 1024),
    Shape("Qwen3-0.6B gate up", 1024, 6144),
    Shape("Qwen3-0.6B down", 3072, 1024),
)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to hold and multiply; bits for each weight, scales and zero points included."""

    name: str
    bits: float


METHODS = (
    Method("bf16", 16.0),
    Method("int4 ours", 4 + 24 / GROUP),
    Method("int4 torch", 4 + 32 / GROUP),
    Method("int8 ours", 8 + 24 / GROUP),
)


def moved_bytes(shape: Shape, rows: int, bits: float) -> float:
    """What a product has to read and write at least: the weight, x and the result in 16 bits."""
    return shape.inputs * shape.outputs * bits / 8 + 2 * rows * (shape.inputs + shape.outputs)


def ring_size(shape: Shape, bits: float) -> int:
    """Copies of the weight that take turns."""
    return max(2, -(-RING_BYTES * 8 // int(shape.inputs * shape.outputs * bits)))


def plan(quick: bool) -> Iterator[tuple[Shape, Method]]:
    """The rows of the table, in order; a shape's methods stand together, bf16 first."""
    for shape in SHAPES[2:4] if quick else SHAPES:
        for method in METHODS:
            yield shape, method


def products(shape: Shape, method: Method) -> list[Callable[[torch.Tensor], Any]]:
    """One product for each weight of the ring. Weights are random: only their sizes matter."""
    size = (shape.outputs, shape.inputs)
    count = ring_size(shape, method.bits)
    if method.name == "bf16":
        dense = [torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
        return [lambda x, w=w: functional.linear(x, w) for w in dense]
    if method.name == "int4 torch":
        return [_torch_int4(shape) for _ in range(count)]
    from quire_quant.cuda_linear import CudaQuantOps

    bits = 4 if method.name.startswith("int4") else 8
    spec = QuantLinearSpec(shape.inputs, shape.outputs, bits, GROUP, "integer", torch.bfloat16)
    op = CudaQuantOps(OpInit(torch.device("cuda"), max(ROWS))).build(spec)
    groups = (shape.outputs, spec.num_groups)
    states = []
    for _ in range(count):
        codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, device="cuda")
        zeros = torch.randint(0, 1 << bits, groups, device="cuda").float()
        states.append(op.pack(codes, torch.rand(groups, device="cuda").half().float(), zeros))
    return [lambda x, state=state: op(x, state) for state in states]


def _torch_int4(shape: Shape) -> Callable[[torch.Tensor], Any]:
    """torch's int4 operation: codes in bytes, scales and zeros [K / group, N, 2]."""
    data = torch.randint(0, 256, (shape.outputs, shape.inputs // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(data, 8)
    both = torch.rand(shape.inputs // GROUP, shape.outputs, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, both)


def measurements(quick: bool) -> Iterator[dict[str, Any]]:
    """One entry for each shape, method and number of rows; first the copy's."""
    from cuda_attention import copy_bandwidth, seconds

    bandwidth = copy_bandwidth(seconds)
    yield {"what": "copy", "GB/s": bandwidth / 1e9}
    baseline: dict[int, float] = {}
    for shape, method in plan(quick):
        ring = products(shape, method)
        for rows in ROWS:
            x = torch.randn(rows, shape.inputs, dtype=torch.bfloat16, device="cuda")
            took = seconds(lambda ring=ring, x=x: [product(x) for product in ring]) / len(ring)
            if method.name == "bf16":
                baseline[rows] = took
            yield {
                "what": f"{shape.name} {method.name}",
                "rows": rows,
                "us": took * 1e6,
                "of copy": moved_bytes(shape, rows, method.bits) / took / bandwidth,
                "x bf16": baseline[rows] / took,
            }
        del ring
        torch.cuda.empty_cache()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    arguments = parser.parse_args()
    rows = []
    for row in measurements(arguments.quick):
        rows.append(row)
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "what")
        print(f"{row['what']:34}{numbers}", flush=True)
    if arguments.json is not None:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
