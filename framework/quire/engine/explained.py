"""Which operation multiplies each linear layer, and why, from the headers of a checkpoint: no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quire.contract.model import LayerFactory
from quire.contract.ops import LinearSpec, OpSpec, QuantLinearSpec
from quire.contract.quant import QuantLinear
from quire.engine.build import build_layers, model_init
from quire.layers.factory import PluginLayers
from quire.registry import PluginHost
from quire.resolve import ResolvedConfig

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """Layers that are alike.

    Attributes:
        layers: their path, with * for the numbers in which they differ. count: how many there are.
        form: how the weight is stored. op: the op set that multiplies by it; None: the method does so itself.
        why: why not one of those that stand before it; empty: it is the first, or was asked for by name.
    """

    layers: str
    count: int
    form: str
    op: str | None
    why: str


def explain_layers(config: ResolvedConfig, host: PluginHost) -> list[LayerChoice]:
    """For every linear layer of a model; raises what building it raises."""
    layers = build_layers(config, host)
    watching = _Watching(layers)
    config.spec.build(model_init(config, watching))
    counts: dict[tuple[str, str, str | None, str], int] = {}
    for choice in _choices(watching, layers):
        counts[choice] = counts.get(choice, 0) + 1
    return [LayerChoice(name, count, form, op, why) for (name, form, op, why), count in counts.items()]


class _Watching(LayerFactory):
    """Notes what a model asks for while it is built."""

    def __init__(self, layers: LayerFactory) -> None:
        self._layers = layers
        self.linears: list[tuple[LinearSpec, QuantLinear | None]] = []

    def op(self, spec: OpSpec) -> Any:
        return self._layers.op(spec)

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        return self._layers.may_fuse(sources)

    def quantizes(self, spec: LinearSpec) -> bool:
        return self._layers.quantizes(spec)

    def quant_linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        made = self._layers.quant_linear(spec, sources)
        self.linears.append((spec, made))
        return made


def _choices(watching: _Watching, layers: PluginLayers) -> Iterator[tuple[str, str, str | None, str]]:
    for spec, quant in watching.linears:
        wanted: OpSpec | None = spec if quant is None else quant.operation()
        if wanted is None:
            yield _path(spec.name), type(quant).__name__, None, ""
            continue
        name, passed_over = layers.judge(wanted)
        form = "dequantized when it is loaded" if quant is not None and wanted.kind == spec.kind else _form(wanted)
        yield _path(spec.name), form, name, "; ".join(passed_over)


def _path(name: str) -> str:
    """a.0.q_proj+a.0.k_proj -> a.*.q_proj+k_proj"""
    first, *others = NUMBER.sub("*", name).split("+")
    return "+".join([first, *(other.rpartition(".")[2] for other in others)])


def _form(spec: OpSpec) -> str:
    if isinstance(spec, QuantLinearSpec):
        return f"{spec.bits} bits in groups of {spec.group_size}, zeros: {spec.zeros}"
    return "unquantized"
