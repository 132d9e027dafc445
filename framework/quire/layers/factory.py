"""Where a model's layers get their operations and quantized forms: from the plugins that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.contract.attention import GraphSupport
from quire.contract.model import LayerFactory
from quire.contract.ops import LinearSpec, OpSet, OpSpec
from quire.contract.quant import QuantLinear, QuantMethod
from quire.errors import ConfigError

DEFAULT = "default"


class PluginLayers(LayerFactory):
    """Picks the first op set that serves a spec, in order of priority, or the one that the user named.

    Args:
        op_sets: (name, op set), highest priority first.
        overrides: kind of operation, or `default` -> name of the op set to use; it never falls back.
        quantization: the method for linear layers, or None.

    Attributes:
        chosen: kind of operation -> op set. graph_support: what was handed out -> the graphs it can run in.
    """

    def __init__(
        self,
        op_sets: Sequence[tuple[str, OpSet]],
        overrides: Mapping[str, str],
        quantization: QuantMethod | None = None,
    ) -> None:
        self._op_sets = dict(op_sets)
        self._overrides = overrides
        self._quantization = quantization
        self.chosen: dict[str, str] = {}
        self.graph_support: dict[str, GraphSupport] = {}

    def op(self, spec: OpSpec) -> Any:
        wanted = self._overrides.get(spec.kind) or self._overrides.get(DEFAULT)
        names = [wanted] if wanted else list(self._op_sets)
        reasons = []
        for name in names:
            why = self._op_sets[name].why_not(spec)
            if not why:
                self.chosen[spec.kind] = name
                self._note(f"op {spec.kind} of {name}", self._op_sets[name].graph_support(spec))
                return self._op_sets[name].build(spec)
            reasons.append(f"{name}: {'; '.join(why)}")
        raise ConfigError(
            f"no op set serves {spec.kind}: {' | '.join(reasons) or 'none is loaded'}",
            remedy=f"change ops.{spec.kind}" if wanted else "load a plugin that provides it",
        )

    def quant_linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        quantized = self._quantization.linear(spec, sources) if self._quantization is not None else None
        if quantized is not None:
            self._note(f"quantization {type(self._quantization).__name__}", quantized.graph)
        return quantized

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        return self._quantization is None or self._quantization.may_fuse(sources)

    def _note(self, name: str, support: GraphSupport) -> None:
        """Remember the least that a component can do inside a captured graph."""
        self.graph_support[name] = min(support, self.graph_support.get(name, GraphSupport.ANY))
