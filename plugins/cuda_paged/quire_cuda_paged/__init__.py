"""cuda_paged: paged attention for NVIDIA GPUs, written in Triton. Nothing here imports Triton before it is selected."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """Attention, operations, sampler and device for CUDA."""
    cuda = frozenset({"cuda"})
    return (
        Provider(
            "attention",
            "cuda_paged",
            "quire_cuda_paged.attention:CudaPagedAttention",
            api=1,
            priority=50,
            devices=cuda,
            probe="quire_cuda_paged.probe:missing",
            summary="paged attention in Triton, split over the KV cache",
        ),
        Provider(
            "op",
            "cuda_paged",
            "quire_cuda_paged.ops:CudaOps",
            api=1,
            priority=50,
            devices=cuda,
            probe="quire_cuda_paged.probe:missing",
            summary="norms and gated activations in one launch each",
        ),
        Provider(
            "sampler",
            "cuda_paged",
            "quire_cuda_paged.sampler:CudaSampler",
            api=1,
            priority=50,
            devices=cuda,
            probe="quire_cuda_paged.probe:missing",
            summary="top-k, top-p and min-p without sorting, one launch for all rows",
        ),
        Provider(
            "device",
            "cuda",
            "quire_cuda_paged.device:CudaDevice",
            api=1,
            priority=50,
            devices=cuda,
            probe="quire_cuda_paged.probe:missing",
            options="quire_cuda_paged.device:CudaOptions",
            summary="an NVIDIA GPU",
        ),
    )
