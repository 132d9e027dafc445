"""Reads a checkpoint's config.json: each key once, with its type; what is missing or odd is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from quire.contract.ops import Activation
from quire.errors import UnsupportedModel
from quire.layers.rotary import KNOWN, RopeConfig

T = TypeVar("T")
REQUIRED: Any = object()
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Settings:
    """A config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def get(self, key: str, kind: type[T], default: T = REQUIRED) -> T:
        """The key's value. Raises UnsupportedModel if it has another type, or is missing without a default."""
        value = self._config.get(key)
        if value is None:
            if default is REQUIRED:
                raise UnsupportedModel(f"config.json lacks {key!r}", remedy="the checkpoint is incomplete")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise UnsupportedModel(f"config.json has {key!r} = {value!r}; it must be a {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """As `get`, None if the key is missing or null."""
        return None if self._config.get(key) is None else self.get(key, kind)

    def activation(self, key: str = "hidden_act") -> Activation:
        """The gated MLP's activation."""
        name = self.get(key, str)
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"config.json has {key!r} = {name!r}; known are {sorted(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def must_be(self, key: str, *allowed: Any) -> None:
        """Raise UnsupportedModel if the key is present with a value that the family's code does not honour."""
        value = self._config.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModel(f"config.json has {key!r} = {value!r}; supported are {list(allowed)}")

    def rope(self, head_dim: int, *, theta: float = 10000.0, layer_type: str | None = None) -> RopeConfig:
        """Rotary settings, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
        parameters = dict(cast(Mapping[str, Any], self._config.get("rope_parameters") or {}))
        if layer_type is not None and layer_type in parameters:
            parameters = dict(parameters[layer_type] or {})
        if not parameters:
            parameters = dict(cast(Mapping[str, Any], self._config.get("rope_scaling") or {}))
        base = float(parameters.get("rope_theta") or self._config.get("rope_theta") or theta)
        partial = parameters.get("partial_rotary_factor") or self._config.get("partial_rotary_factor") or 1.0
        positions = self.get("max_position_embeddings", int)
        original = self._config.get("original_max_position_embeddings") or positions
        rope = RopeConfig(head_dim, int(head_dim * float(partial)), base, parameters, positions, int(original))
        if rope.kind not in KNOWN:
            raise UnsupportedModel(f"config.json has rope type {rope.kind!r}; known are {list(KNOWN)}")
        return rope

    def head_dim(self) -> int:
        """`head_dim`, or the hidden size divided among the heads."""
        return self.optional("head_dim", int) or self.get("hidden_size", int) // self.get("num_attention_heads", int)

    def layer_types(self) -> tuple[str, ...] | None:
        """`layer_types`, one per layer, if the checkpoint names them."""
        types = self._config.get("layer_types")
        return tuple(types) if types else None

    def tied(self, default: bool) -> bool:
        """`tie_word_embeddings`."""
        return self.get("tie_word_embeddings", bool, default)
