"""quant: reads GPTQ, AWQ, compressed-tensors and FP8 checkpoints; makes int8 weights of unquantized ones."""

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
        _reader("compressed-tensors", "CompressedTensorsMethod", "weights in 1 to 8 bits, or in float8", "compressed"),
        Provider(
            "quantization", "fp8", "quire_quant.fp8:FP8Method", api=1, summary="FP8 checkpoints, dequantized at load"
        ),
    )


def _reader(name: str, target: str, summary: str, module: str | None = None) -> Provider:
    return Provider(
        "quantization",
        name,
        f"quire_quant.{module or name}:{target}",
        api=1,
        options="quire_quant.linear:KernelOptions",
        summary=summary,
    )
