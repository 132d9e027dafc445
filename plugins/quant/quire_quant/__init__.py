"""quant: reads GPTQ, AWQ, compressed-tensors and FP8 checkpoints; rounds unquantized ones to int8 or int4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quire.plugin import Provider, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """The methods; none needs a particular device."""
    return (
        _rounding("int8", "Int8", "int8 weights, rounded to nearest at load"),
        _rounding("int4", "Int4", "int4 weights, rounded to nearest at load"),
        _reader("gptq", "GPTQMethod", "GPTQ checkpoints of 2, 3, 4 and 8 bits"),
        _reader("awq", "AWQMethod", "AWQ checkpoints, gemm and gemv"),
        _reader("compressed-tensors", "CompressedTensorsMethod", "weights in 1 to 8 bits, or in float8", "compressed"),
        Provider(
            "quantization",
            "fp8",
            "quire_quant.fp8:FP8Method",
            api=1,
            summary="FP8 checkpoints, multiplied as they are or dequantized at load",
        ),
        Provider(
            "op",
            "int4pack",
            "quire_quant.kernels:Int4PackOps",
            api=1,
            devices=frozenset({"cpu"}),
            summary="codes of up to 4 bits by torch's int4 operation",
        ),
        Provider(
            "op",
            "triton_quant",
            "quire_quant.cuda_linear:CudaQuantOps",
            api=1,
            priority=50,
            devices=frozenset({"cuda"}),
            probe="quire_quant.cuda_probe:missing",
            summary="codes of up to 8 bits by Triton kernels for NVIDIA GPUs",
        ),
        Provider(
            "op",
            "dequant",
            "quire_quant.kernels:DequantOps",
            api=1,
            priority=-10,
            summary="codes of up to 8 bits, dequantized for every multiplication",
        ),
    )


def _rounding(name: str, prefix: str, summary: str) -> Provider:
    module = "quire_quant.rounding"
    options = f"{module}:{prefix}Options"
    return Provider("quantization", name, f"{module}:{prefix}Method", api=1, options=options, summary=summary)


def _reader(name: str, target: str, summary: str, module: str | None = None) -> Provider:
    return Provider(
        "quantization",
        name,
        f"quire_quant.{module or name}:{target}",
        api=1,
        summary=summary,
    )


@hookimpl
def quire_cli(app: typer.Typer) -> None:
    """Add `quire quantize`."""
    from quire_quant.command import quantize

    app.command()(quantize)
