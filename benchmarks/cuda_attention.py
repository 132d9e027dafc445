"""Attention kernels on a GPU: share of the memory's and of the tensor cores' measured speed, under graph replay.

    python benchmarks/cuda_attention.py [--json FILE] [--quick]

Decode reads keys and values once, so its limit is the copy bandwidth that the same run measures;
prefill's is the measured rate of a large matrix product. Launch times of Python are left out by
replaying a captured graph; medians of several replays.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from quire.contract.attention import AttentionInit, AttentionLayer
from quire.testing.batches import make_batch
from quire.testing.placement import placed
from quire_cuda_paged.attention import CudaPagedAttention

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
REPLAYS = 20


def seconds(work: Callable[[], Any]) -> float:
    """Median time of one run, replayed from a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    return 2 * 8192**3 / seconds(lambda: torch.mm(a, a, out=out))


def attention_seconds(query_lens: list[int], context_lens: list[int]) -> float:
    """One layer's attention over a batch, planning left out: it is done once per step."""
    layer = AttentionLayer(0, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5)
    case = make_batch(query_lens, context_lens, block_size=BLOCK_SIZE)
    batch = placed(case.batch, "cuda")
    width = batch.block_table.shape[1]
    init = AttentionInit(
        torch.device("cuda"), torch.bfloat16, (layer,), BLOCK_SIZE, batch.num_reqs, batch.num_tokens, width
    )
    backend = CudaPagedAttention(init)
    kv = tuple(
        torch.randn(case.num_blocks, *spec.shape, device="cuda").to(spec.dtype)
        for spec in backend.kv_spec(layer, BLOCK_SIZE, torch.bfloat16)
    )
    q = torch.randn(batch.num_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    out, plan = torch.empty_like(q), backend.plan(batch)
    return seconds(lambda: backend.forward(layer, q, q, q, kv, batch, plan, out))


def measurements(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per point of the sweep."""
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    yield {"what": "copy", "GB/s": bandwidth / 1e9}
    yield {"what": "matmul", "TFLOP/s": rate / 1e12}
    for rows in (1, 64) if quick else (1, 8, 64, 256):
        for context in (1024,) if quick else (1024, 4096, 16384):
            took = attention_seconds([1] * rows, [context - 1] * rows)
            read = rows * context * 2 * KV_HEADS * HEAD_DIM * 2
            yield {"what": f"decode {rows} x {context}", "us": took * 1e6, "of copy": read / took / bandwidth}
    for length in (2048,) if quick else (512, 2048, 8192):
        took = attention_seconds([length], [0])
        operations = 2 * 2 * HEADS * HEAD_DIM * length * (length + 1) / 2
        yield {"what": f"prefill {length}", "us": took * 1e6, "of matmul": operations / took / rate}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a few points only")
    arguments = parser.parse_args()
    rows = []
    for row in measurements(arguments.quick):
        rows.append(row)
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "what")
        print(f"{row['what']:20}{numbers}", flush=True)
    if arguments.json is not None:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
