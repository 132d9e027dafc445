"""Finds the model spec that serves a checkpoint: a native one by architecture, else a bridge that is willing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.contract.model import ModelSpec
from quire.errors import UnsupportedModel


def select_spec(specs: Sequence[tuple[str, ModelSpec]], config: Mapping[str, Any]) -> tuple[str, ModelSpec]:
    """(provider name, spec) for a config.json, in the order of `specs`. Raises UnsupportedModel with the reasons."""
    wanted = [str(name) for name in config.get("architectures") or ()]
    reasons: list[str] = []
    for name, spec in specs:
        if spec.architectures and not spec.architectures & set(wanted):
            continue
        why = spec.why_not(config)
        if not why:
            return name, spec
        reasons.append(f"{name}: {'; '.join(why)}")
    native = sorted(architecture for _, spec in specs for architecture in spec.architectures)
    raise UnsupportedModel(
        f"no model plugin serves {wanted}" + (f": {' | '.join(reasons)}" if reasons else ""),
        remedy=f"native are {native}",
    )
