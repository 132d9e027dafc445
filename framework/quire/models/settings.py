"""Reads a checkpoint's config.json: each key once, with its type; what is missing or odd is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from quire.contract.ops import Activation
from quire.errors import UnsupportedModel
from quire.layers.rotary import RopeConfig

T = TypeVar("T")
REQUIRED: Any = object()
LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Settings:
    """A config.json.

    `defaults` are the family's values, as transformers has them, for keys that the file leaves out; a
    key that is there as null is null.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._config = {**(defaults or {}), **config}

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

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        layer_type: str | None = None,
        partial: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> RopeConfig:
        """Rotary settings, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        `partial`: the family turns a part of each head if `partial_rotary_factor` says so.
        `renamed`: older names of scalings. Raises UnsupportedModel.
        """
        parameters = dict(cast(Mapping[str, Any], self._config.get("rope_parameters") or {}))
        if layer_type is not None and layer_type in parameters:
            parameters = dict(parameters[layer_type] or {})
        if not parameters:
            parameters = dict(cast(Mapping[str, Any], self._config.get("rope_scaling") or {}))
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        parameters["rope_type"] = (renamed or {}).get(kind, kind)
        base = float(parameters.get("rope_theta") or self._config.get("rope_theta") or theta)
        part = float(parameters.get("partial_rotary_factor") or self._config.get("partial_rotary_factor") or 1.0)
        if part != 1.0 and not partial:
            raise UnsupportedModel(f"config.json has 'partial_rotary_factor' = {part}; this family turns whole heads")
        positions = self.get("max_position_embeddings", int)
        name = "original_max_position_embeddings"
        # The outer one counts first, as in transformers: Phi-3 has both.
        original = int(self._config.get(name) or parameters.get(name) or positions)
        return RopeConfig(head_dim, int(head_dim * part), base, parameters, positions, original)

    def head_dim(self) -> int:
        """`head_dim`, or the hidden size divided among the heads."""
        return self.optional("head_dim", int) or self.get("hidden_size", int) // self.get("num_attention_heads", int)

    def layer_types(self) -> tuple[str, ...] | None:
        """`layer_types`, one per layer, if the checkpoint names them. Raises UnsupportedModel for other types."""
        types = self._config.get("layer_types")
        if not types:
            return None
        if other := sorted({str(kind) for kind in types} - set(LAYER_TYPES)):
            raise UnsupportedModel(f"config.json has 'layer_types' with {other}; supported are {list(LAYER_TYPES)}")
        if len(types) != (count := self.get("num_hidden_layers", int)):
            raise UnsupportedModel(f"config.json has {len(types)} 'layer_types' for {count} layers")
        return tuple(types)

    def tied(self, default: bool) -> bool:
        """`tie_word_embeddings`."""
        return self.get("tie_word_embeddings", bool, default)
