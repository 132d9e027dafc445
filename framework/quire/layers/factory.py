"""Where a model's layers get their operations and quantized forms: from the plugins that were chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from quire.contract.attention import GraphSupport
from quire.contract.model import LayerFactory
from quire.contract.ops import LinearSpec, OpSet, OpSpec
from quire.contract.quant import QuantLinear, QuantMethod
from quire.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT = "default"


class Operations:
    """Picks the first op set that serves a spec, in order of priority, or the one that the user named.

    Args:
        op_sets: (name, op set), highest priority first.
        overrides: kind of operation, or `default` -> name of the op set to use; it never falls back.

    Attributes:
        chosen: kind of operation -> op sets. graph_support: what was handed out -> the graphs it can run in.
    """

    def __init__(self, op_sets: Sequence[tuple[str, OpSet]], overrides: Mapping[str, str]) -> None:
        self._op_sets = dict(op_sets)
        self._overrides = overrides
        self.chosen: dict[str, set[str]] = {}
        self.graph_support: dict[str, GraphSupport] = {}

    def op(self, spec: OpSpec) -> Any:
        """The operation for a spec. Raises ConfigError that gives each op set's reasons."""
        name, passed_over = self.judge(spec)
        reasons = " | ".join(passed_over)
        if name is None:
            raise ConfigError(
                f"no op set serves {spec.kind}: {reasons or 'none is loaded'}",
                remedy=f"change ops.{spec.kind}" if self._named(spec) else "load a plugin that provides it",
            )
        self.chosen.setdefault(spec.kind, set()).add(name)
        logger.debug("%s by %s: %s; passed over: %s", spec.kind, name, spec, reasons or "none")
        note = f"op {spec.kind} of {name}"
        support = self._op_sets[name].graph_support(spec)
        self.graph_support[note] = min(support, self.graph_support.get(note, support))
        return self._op_sets[name].build(spec)

    def judge(self, spec: OpSpec) -> tuple[str | None, list[str]]:
        """The op set that serves a spec, or None, and why those before it do not."""
        named = self._named(spec)
        passed_over: list[str] = []
        others = [name for name, op_set in self._op_sets.items() if spec.kind in op_set.kinds]
        for name in [named] if named else others:
            why = self._op_sets[name].why_not(spec)
            if not why:
                return name, passed_over
            passed_over.append(f"{name}: {'; '.join(why)}")
        return None, passed_over

    def unused_overrides(self) -> dict[str, str]:
        """Overrides of kinds that nothing has asked for so far."""
        return {kind: name for kind, name in self._overrides.items() if kind not in {DEFAULT, *self.chosen}}

    def _named(self, spec: OpSpec) -> str | None:
        return self._overrides.get(spec.kind) or self._overrides.get(DEFAULT)


class PluginLayers(LayerFactory):
    """Operations from op sets; quantized layers from a method, or none."""

    def __init__(self, operations: Operations, quantization: QuantMethod | None = None) -> None:
        self._operations = operations
        self._quantization = quantization
        self._quantized = GraphSupport.ANY

    def op(self, spec: OpSpec) -> Any:
        return self._operations.op(spec)

    def judge(self, spec: OpSpec) -> tuple[str | None, list[str]]:
        """As `Operations.judge`."""
        return self._operations.judge(spec)

    def quant_linear(self, spec: LinearSpec, sources: tuple[LinearSpec, ...]) -> QuantLinear | None:
        if self._quantization is None:
            return None
        quantized = self._quantization.linear(spec, sources)
        if quantized is not None:
            self._quantized = min(self._quantized, quantized.graph)
        return quantized

    def quantizes(self, spec: LinearSpec) -> bool:
        return self._quantization is not None and self._quantization.linear(spec, (spec,)) is not None

    def unused_overrides(self) -> dict[str, str]:
        """Kinds of operation for which an op set was named and of which the model has none -> that op set."""
        return self._operations.unused_overrides()

    @property
    def graph_support(self) -> dict[str, GraphSupport]:
        """What was handed out -> the graphs it can run in."""
        quantization = {} if self._quantization is None else {type(self._quantization).__name__: self._quantized}
        return self._operations.graph_support | quantization

    def may_fuse(self, sources: tuple[LinearSpec, ...]) -> bool:
        return self._quantization is None or self._quantization.may_fuse(sources)
