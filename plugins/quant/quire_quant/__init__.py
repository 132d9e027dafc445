"""quant: reads GPTQ and AWQ checkpoints; makes int8 weights when an unquantized checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """The methods; none needs a particular device."""
    return (
        Provider(
            "quantization",
            "int8",
            "quire_quant.int8:Int8Method",
            api=1,
            options="quire_quant.int8:Int8Options",
            summary="int8 weights, rounded to nearest at load",
        ),
        _reader("gptq", "GPTQMethod", "GPTQ checkpoints of 2, 3, 4 and 8 bits"),
        _reader("awq", "AWQMethod", "AWQ checkpoints, gemm and gemv"),
    )


def _reader(name: str, target: str, summary: str) -> Provider:
    return Provider(
        "quantization",
        name,
        f"quire_quant.{name}:{target}",
        api=1,
        options="quire_quant.linear:KernelOptions",
        summary=summary,
    )
