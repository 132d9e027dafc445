"""quant: quantization methods. So far int8 weights, made when an unquantized checkpoint is loaded."""

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
    )
