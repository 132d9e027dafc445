"""Times the choices that cpu_ref has made, on this machine: its form beside the plain torch one, in turn.

    python benchmarks/cpu_ref_micro.py [--threads 1] [--parts attention,linear,pointwise]

Shapes are Qwen3-0.6B's. Times are the best of several rounds, in microseconds; on a shared machine
only the ratios of one line mean something.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from quire.plugin import (
    AttentionBackend,
    AttentionBatch,
    AttentionInit,
    AttentionLayer,
    GatedActSpec,
    HeadNorm,
    LinearOp,
    LinearSpec,
    OpInit,
    QKVStep,
    RMSNormSpec,
)
from quire.testing.batches import make_batch
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.linear import DeterministicLinear, PackedLinear, TorchLinear
from quire_cpu_ref.ops import TorchOps
from torch import Tensor
from torch.nn import functional

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 16, 8, 128, 16
LAYER = AttentionLayer(0, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5)
LINEARS = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}
HEAD = (1024, 151936)
COLD_ELEMENTS = 40_000_000
"""Weights that are cycled through, so that they come from memory as in a model, not from the cache."""
DTYPES = (torch.bfloat16, torch.float32)


def race(functions: Sequence[Callable[[], object]], seconds: float = 0.4, rounds: int = 5) -> list[float]:
    """Best time of each in microseconds, taken in turn."""
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], (time.perf_counter() - start) * 1e6)
        done += 1
    return best


def report(what: str, names: Sequence[str], times: Sequence[float]) -> None:
    cells = "  ".join(
        f"{name} {value:9.0f} ({times[0] / value:5.2f}x)" for name, value in zip(names, times, strict=True)
    )
    print(f"{what:42} {cells}", flush=True)


def plain_attention(q: Tensor, kv: tuple[Tensor, ...], blocks: Tensor, mask: Tensor) -> Tensor:
    """Padded gather and scaled_dot_product_attention with enable_gqa, equal query lengths."""
    num_rows = blocks.shape[0]
    keys, values = (cache[blocks].flatten(1, 2).transpose(1, 2) for cache in kv)
    queries = q.view(num_rows, -1, HEADS, HEAD_DIM).transpose(1, 2)
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=LAYER.scale, enable_gqa=True
    )


def served(batch: AttentionBatch, q: Tensor, kv: tuple[Tensor, ...], deterministic: bool) -> Callable[[], object]:
    """One layer's forward by cpu_ref, planned."""
    width = batch.block_table.shape[1]
    init = AttentionInit(q.device, q.dtype, (LAYER,), BLOCK, batch.num_reqs, 1024, width, deterministic)
    backend = CpuRefAttention(init)
    return partial(backend.forward, LAYER, q, q, q, kv, batch, backend.plan(batch), torch.empty_like(q))


def attention() -> None:
    shapes = [(rows, 1, length) for rows in (1, 8, 32) for length in (64, 256, 1024, 2048)]
    for dtype in DTYPES:
        for rows, queries, length in [*shapes, (8, 5, 300), (1, 512, 512), (1, 128, 1024)]:
            case = make_batch([queries] * rows, [length - queries] * rows, block_size=BLOCK)
            kv = tuple(torch.randn(case.num_blocks, BLOCK, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
            q = torch.randn(rows * queries, HEADS, HEAD_DIM).to(dtype)
            blocks = torch.tensor(case.tables)
            key = torch.arange(blocks.shape[1] * BLOCK)
            mask = (key <= torch.arange(length - queries, length)[:, None])[None, None]

            names = ["plain", "cpu_ref", "deterministic"]
            work = [
                partial(plain_attention, q, kv, blocks, mask),
                *(served(case.batch, q, kv, deterministic) for deterministic in (False, True)),
            ]
            report(f"attention {str(dtype)[6:]} B={rows} q={queries} N={length}", names, race(work))


def over_all(op: LinearOp, x: Tensor, states: Sequence[object]) -> None:
    for state in states:
        op(x, state)


def linear() -> None:
    for dtype in DTYPES:
        for name, (inner, outer) in {**LINEARS, "head": HEAD}.items():
            spec = LinearSpec(inner, outer, False, dtype)
            copies = max(1, COLD_ELEMENTS // (inner * outer))
            weights = [torch.randn(outer, inner).to(dtype) for _ in range(copies)]
            forms = {
                "plain": TorchLinear(spec),
                "packed": PackedLinear(spec),
                "deterministic": DeterministicLinear(spec, packed=True),
            }
            states = {form: [op.pack(weight, None) for weight in weights] for form, op in forms.items()}
            for rows in (1, 8, 32) if name == "head" else (1, 8, 32, 512):
                x = torch.randn(rows, inner).to(dtype)

                times = race([partial(over_all, op, x, states[form]) for form, op in forms.items()])
                label = f"linear {str(dtype)[6:]} {name} {inner}x{outer} M={rows}"
                report(label, list(forms), [value / copies for value in times])


def spelt_out_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def pointwise() -> None:
    ops = TorchOps(OpInit(torch.device("cpu"), 512))
    for dtype in DTYPES:
        for rows in (1, 8, 32, 512):
            x, weight = torch.randn(rows, 1024).to(dtype), torch.rand(1024).to(dtype)
            norm = ops.build(RMSNormSpec(1024, 1e-6, dtype))
            times = race([partial(spelt_out_norm, x, weight), partial(norm, x, weight)])
            report(f"rms_norm {str(dtype)[6:]} M={rows}", ["spelt out", "cpu_ref"], times)
            wide = torch.randn(rows, 6144).to(dtype)
            acts = [ops.build(GatedActSpec(3072, "silu", dtype, deterministic)) for deterministic in (False, True)]
            times = race([partial(act, wide) for act in acts])
            report(f"silu_mul {str(dtype)[6:]} M={rows}", ["cpu_ref", "deterministic"], times)
            prepare(rows, dtype)


def prepare(rows: int, dtype: torch.dtype) -> None:
    case = make_batch([1] * rows, [3] * rows, block_size=BLOCK)
    backend = CpuRefAttention(AttentionInit(torch.device("cpu"), dtype, (LAYER,), BLOCK, rows, rows, 8))
    kv = tuple(torch.zeros(case.num_blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    norms = [HeadNorm(torch.rand(HEAD_DIM).to(dtype), 1e-6) for _ in range(2)]
    angles = torch.randn(rows, HEAD_DIM // 2)
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    step = QKVStep(LAYER, qkv, angles.cos(), angles.sin(), kv, case.batch, "neox", *norms)
    times = race([lambda: AttentionBackend.prepare_qkv(backend, step), lambda: backend.prepare_qkv(step)])
    report(f"prepare_qkv {str(dtype)[6:]} M={rows}", ["composed", "cpu_ref"], times)


def main() -> None:
    parts = {"attention": attention, "linear": linear, "pointwise": pointwise}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; its own choice if not given")
    parser.add_argument("--parts", default=",".join(parts), help=f"which of {list(parts)}")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        for part in arguments.parts.split(","):
            if part not in parts:
                parser.error(f"{part!r} is not one of {list(parts)}")
            parts[part]()


if __name__ == "__main__":
    main()
