"""cpu_ref: the reference backend. The oracle of every other one, and the default without a GPU."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """Attention and device for CPUs, and plain torch operations for any device."""
    cpu = frozenset({"cpu"})
    return (
        Provider(
            "attention",
            "cpu_ref",
            "quire_cpu_ref.attention:CpuRefAttention",
            api=1,
            devices=cpu,
            summary="paged attention in plain torch",
        ),
        Provider("op", "torch", "quire_cpu_ref.ops:TorchOps", api=1, summary="every operation in plain torch"),
        Provider(
            "device",
            "cpu",
            "quire_cpu_ref.device:CpuDevice",
            api=1,
            devices=cpu,
            options="quire_cpu_ref.device:CpuOptions",
            summary="the CPU",
        ),
    )
