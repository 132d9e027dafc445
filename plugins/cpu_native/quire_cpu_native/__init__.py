"""cpu_native: kernels in C++ for CPUs, built once on the machine that runs them. cpu_ref is their oracle."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl

PRIORITY = 20
"""Above cpu_ref and quant's torch kernels."""


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """Attention and operations."""
    cpu, probe = frozenset({"cpu"}), "quire_cpu_native.build:missing"
    return (
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
    )
