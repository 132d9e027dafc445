"""The CUDA kernels on a GPU: share of the memory's and of the tensor cores' measured speed, under graph replay.

    python benchmarks/cuda_attention.py [--json FILE] [--quick]

Decode reads keys and values once, so its limit is the copy bandwidth that the same run measures; prefill's is
the measured rate of a large matrix product; the sampler and the fused operations read and write each byte once.
What is timed is a captured graph, replayed: the time that Python takes to launch is left out. Before each replay
the GPU's cache is overwritten; figures are medians. Other libraries' paged attention is measured beside ours where
it can be imported.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from quire.plugin import (
    KV_DTYPES,
    AttentionInit,
    AttentionLayer,
    GatedActSpec,
    OpInit,
    QKVStep,
    RMSNormSpec,
    SamplerInit,
)
from quire.testing.batches import BatchCase, make_batch
from quire.testing.placement import placed
from quire.testing.sampler import RowParams, sampling_batch
from quire_cuda_paged.attention import CudaPagedAttention
from quire_cuda_paged.ops import CudaOps
from quire_cuda_paged.sampler import CudaSampler
from torch import Tensor

REPLAYS = 20
CACHE_BYTES = 256 << 20
"""More than a GPU's second-level cache holds: 50 MB on an H100, 126 MB on a B200."""
Work = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Model:
    """The layer that is measured: Llama-3.1-8B's unless said otherwise."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    vocab_size: int = 128_256
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer(self) -> AttentionLayer:
        return AttentionLayer(0, self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Point:
    """One batch for attention: `rows` requests with `query_len` new tokens each, `context` tokens in all."""

    rows: int
    query_len: int
    context: int
    kv_dtype: str = "auto"

    @property
    def is_prefill(self) -> bool:
        return self.query_len == self.context

    @property
    def name(self) -> str:
        kind = "prefill" if self.is_prefill else "decode" if self.query_len == 1 else f"verify {self.query_len}"
        return " ".join([kind, f"{self.rows} x {self.context}", *([self.kv_dtype] if self.kv_dtype != "auto" else [])])

    def kv_bytes(self, model: Model) -> int:
        """Of keys and values, each read once."""
        itemsize = KV_DTYPES.get(self.kv_dtype, model.dtype).itemsize
        return self.rows * self.context * 2 * model.num_kv_heads * model.head_dim * itemsize

    def operations(self, model: Model) -> int:
        """Multiplications and additions of both matrix products, the masked half left out."""
        before = self.context - self.query_len
        pairs = self.query_len * before + self.query_len * (self.query_len + 1) // 2
        return self.rows * 2 * 2 * model.num_heads * model.head_dim * pairs


def sweep(*, quick: bool) -> Iterator[Point]:
    """The points of the sweep."""
    for kv_dtype in ("auto",) if quick else ("auto", "fp8_e4m3"):
        for rows in (1, 64) if quick else (1, 8, 64, 256):
            for context in (1024,) if quick else (1024, 4096, 16_384):
                yield Point(rows, 1, context, kv_dtype)
    if not quick:
        yield Point(64, 4, 4096)
    for length in (2048,) if quick else (512, 2048, 8192):
        yield Point(1, length, length)


@dataclass(frozen=True, slots=True)
class Attention:
    """Everything that one call of attention reads, on the device."""

    model: Model
    point: Point
    case: BatchCase
    backend: CudaPagedAttention
    q: Tensor
    kv: tuple[Tensor, ...]
    out: Tensor

    @classmethod
    def make(cls, model: Model, point: Point, device: str) -> Attention:
        context = point.context - point.query_len
        case = make_batch([point.query_len] * point.rows, [context] * point.rows, block_size=model.block_size)
        case = placed(case, device)
        batch, layer = case.batch, model.layer
        width = batch.block_table.shape[1]
        init = AttentionInit(
            torch.device(device),
            model.dtype,
            (layer,),
            model.block_size,
            batch.num_reqs,
            batch.num_tokens,
            width,
            kv_dtype=point.kv_dtype,
        )
        backend = CudaPagedAttention(init)
        q = torch.randn(batch.num_tokens, model.num_heads, model.head_dim, dtype=model.dtype, device=device)
        kv = tuple(
            torch.empty(case.num_blocks, *spec.shape, dtype=model.dtype, device=device).normal_().to(spec.dtype)
            for spec in backend.kv_spec(layer, model.block_size, init.cache_dtype)
        )
        return cls(model, point, case, backend, q, kv, torch.empty_like(q))

    def ours(self) -> Work:
        """One layer's attention; the plan is left out, as it is made once per step."""
        batch, layer = self.case.batch, self.model.layer
        plan = self.backend.plan(batch)
        return lambda: self.backend.forward(layer, self.q, self.q, self.q, self.kv, batch, plan, self.out)

    def flash_attention_3(self) -> Work:
        """FlashAttention 3 as vLLM ships it. Raises ImportError without it."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        batch = self.case.batch
        return lambda: flash_attn_varlen_func(
            q=self.q,
            k=self.kv[0],
            v=self.kv[1],
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_k=batch.max_seq_len,
            seqused_k=batch.seq_lens,
            softmax_scale=self.model.layer.scale,
            causal=True,
            block_table=batch.block_table,
            out=self.out,
            fa_version=3,
        )

    def torch_varlen(self) -> Work:
        """torch's own, paged from 2.12. Raises ImportError, or TypeError where it is not."""
        from torch.nn.attention.varlen import varlen_attn

        batch = self.case.batch
        return lambda: varlen_attn(
            self.q,
            self.kv[0],
            self.kv[1],
            batch.query_start_loc,
            None,
            batch.max_query_len,
            batch.max_seq_len,
            scale=self.model.layer.scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=batch.seq_lens,
            block_table=batch.block_table,
        )


def seconds(work: Work) -> float:
    """Median time of one run, replayed from a graph."""
    spoiler = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
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
        spoiler.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_bandwidth(time: Callable[[Work], float]) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time(lambda: target.copy_(source))


def matmul_rate(time: Callable[[Work], float]) -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    return 2 * 8192**3 / time(lambda: torch.mm(a, a, out=out))


def attention_rows(
    model: Model, points: Iterator[Point], device: str, time: Callable[[Work], float], bandwidth: float, rate: float
) -> Iterator[dict[str, Any]]:
    """One row per point and library; a library that cannot serve a point says why."""
    for point in points:
        attention = Attention.make(model, point, device)
        makers = {"": attention.ours}
        if point.kv_dtype == "auto":
            makers |= {"flash attention 3": attention.flash_attention_3, "torch varlen": attention.torch_varlen}
        for library, maker in makers.items():
            what = f"{point.name} {library}".strip()
            try:
                took = time(maker())
            except Exception as error:
                if not library:
                    raise
                yield {"what": what, "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
                continue
            if point.is_prefill:
                share = {"of matmul": point.operations(model) / took / rate}
            else:
                share = {"of copy": point.kv_bytes(model) / took / bandwidth}
            yield {"what": what, "us": took * 1e6, **share}


def sampler_work(model: Model, device: str) -> Iterator[tuple[str, int, Work]]:
    """(name, bytes of the logits, work) of the sampler; it walks them several times, from the cache if they fit."""
    kinds = {
        "greedy": RowParams(temperature=0.0),
        "temperature": RowParams(temperature=0.8),
        "top-k 50": RowParams(temperature=0.8, top_k=50),
        "top-p 0.95": RowParams(temperature=0.8, top_p=0.95),
        "top-k, top-p, min-p": RowParams(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02),
    }
    for rows in (1, 64, 256):
        logits = torch.randn(rows, model.vocab_size, device=device) * 3
        sampler = CudaSampler(SamplerInit(torch.device(device), model.vocab_size, rows))
        for name, params in kinds.items():
            batch = sampling_batch([params] * rows, device)
            yield f"sample {rows} x {name}", logits.nbytes, lambda b=batch, x=logits, s=sampler: s.sample(x, b)


def op_work(model: Model, device: str) -> Iterator[tuple[str, int, Work]]:
    """(name, bytes read and written, work) of what stands around attention."""
    ops = CudaOps(OpInit(torch.device(device), 2048))
    norm = ops.build(RMSNormSpec(model.hidden_size, 1e-6, model.dtype))
    act = ops.build(GatedActSpec(model.intermediate_size, "silu", model.dtype))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=model.dtype, device=device)

    for tokens in (1, 64, 2048):
        x, residual, weight = draw(tokens, model.hidden_size), draw(tokens, model.hidden_size), draw(model.hidden_size)
        yield f"add, norm {tokens}", 4 * x.nbytes, lambda a=x, b=residual, w=weight: norm(a, w, b)
        gates = draw(tokens, 2 * model.intermediate_size)
        yield f"silu, mul {tokens}", 3 * gates.nbytes // 2, lambda a=gates: act(a)
        attention = Attention.make(model, Point(tokens, 1, 64), device)
        qkv = draw(tokens, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
        angles = torch.rand(tokens, model.head_dim // 2, device=device)
        step = QKVStep(model.layer, qkv, angles.cos(), angles.sin(), attention.kv, attention.case.batch)
        moved = 2 * qkv.nbytes + 2 * angles.nbytes
        yield f"rotate, cache {tokens}", moved, lambda a=attention, s=step: a.backend.prepare_qkv(s)


def measurements(*, quick: bool) -> Iterator[dict[str, Any]]:
    """One row per figure."""
    model = Model()
    bandwidth, rate = copy_bandwidth(seconds), matmul_rate(seconds)
    yield {"what": "copy", "GB/s": bandwidth / 1e9}
    yield {"what": "matmul", "TFLOP/s": rate / 1e12}
    yield from attention_rows(model, sweep(quick=quick), "cuda", seconds, bandwidth, rate)
    for name, moved, work in (*sampler_work(model, "cuda"), *op_work(model, "cuda")):
        took = seconds(work)
        yield {"what": name, "us": took * 1e6, "of copy": moved / took / bandwidth}


def shown(row: dict[str, Any]) -> str:
    """A row of the table."""
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
    return f"{row['what']:38}{numbers or row.get('reason', '')}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a few points only")
    arguments = parser.parse_args()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    rows = []
    for row in measurements(quick=arguments.quick):
        rows.append(row)
        print(shown(row), flush=True)
        if arguments.json is not None:  # after each, so that a time limit leaves what there is
            arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
