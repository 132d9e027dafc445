"""cpu_native: kernels in C++ for CPUs, built once on the machine that runs them. cpu_ref is their oracle."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl

PRIORITY = 20
"""Above cpu_ref and quant's torch kernels."""
LEAST_PRIORITY = -100
"""Below everything that is as exact as the compute dtype."""


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """Device, attention, operations, sampler."""
    cpu, probe = frozenset({"cpu"}), "quire_cpu_native.build:missing"
    return (
        Provider(
            "device",
            "cpu_native",
            "quire_cpu_native.device:NativeDevice",
            api=1,
            priority=PRIORITY,
            devices=cpu,
            probe=probe,
            options="quire_cpu_native.device:NativeDeviceOptions",
            summary="the CPU; decode steps of few rows are recorded",
        ),
        Provider(
            "attention",
            "cpu_native",
            "quire_cpu_native.attention:NativeAttention",
            api=1,
            priority=PRIORITY,
            devices=cpu,
            probe=probe,
            summary="paged attention in C++, read in place",
        ),
        Provider(
            "op",
            "cpu_native",
            "quire_cpu_native.ops:NativeOps",
            api=1,
            priority=PRIORITY,
            devices=cpu,
            probe=probe,
            summary="linears, plain and in codes, norms and gated activations in C++",
        ),
        Provider(
            "op",
            "native_a8",
            "quire_cpu_native.ops:NativeA8Ops",
            api=1,
            priority=LEAST_PRIORITY,
            devices=cpu,
            probe=probe,
            summary="codes by inputs of 8 bits in C++ (W4A8, W8A8): less exact, only when named",
        ),
        Provider(
            "sampler",
            "cpu_native",
            "quire_cpu_native.sampler:NativeSampler",
            api=1,
            priority=PRIORITY,
            devices=cpu,
            probe=probe,
            summary="top-k, top-p, min-p and the draw in C++, a row to a thread",
        ),
    )
