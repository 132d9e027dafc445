"""Scales of an 8-bit KV cache that checkpoints carry beside their weights, one for each layer's keys and values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from quire.contract.attention import AttentionLayer
from quire.errors import UnsupportedModel

NAME = re.compile(r".*\blayers\.(\d+)\.self_attn\.(?:(?:qkv|([kv]))_proj\.)?([kv])_scale")
"""`self_attn.k_scale`, as compressed-tensors names it, and `self_attn.k_proj.k_scale`, as ModelOpt does."""


class KVScales:
    """Takes the scales by the checkpoint's names, and gives them to the layers once all are here."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, Any]] = {}

    def load(self, name: str, tensor: Tensor) -> bool:
        """Take a scale; False if the name is another tensor's. Raises UnsupportedModel for one that cannot be used."""
        match = NAME.fullmatch(name)
        if match is None or match[2] not in (None, match[3]):
            return False
        if tensor.numel() != 1:
            raise UnsupportedModel(
                f"{name!r} has shape {list(tensor.shape)}; read is one scale for a layer's keys and one for its values",
                remedy="export the model with a KV cache scheme by tensor",
            )
        scale = float(tensor.float())
        if not (math.isfinite(scale) and scale > 0):
            raise UnsupportedModel(f"{name!r} is {scale}; a scale is above 0", remedy="calibrate the KV cache again")
        self._found.setdefault(int(match[1]), {})[f"{match[3]}_scale"] = scale
        return True

    def applied(self, layers: Iterable[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """The layers with their scales; what has none stays as it is. Raises UnsupportedModel for unknown layers."""
        known = tuple(layers)
        if unknown := sorted(set(self._found) - {layer.layer_id for layer in known}):
            raise UnsupportedModel(f"the checkpoint has KV cache scales for layers {unknown}, which config.json lacks")
        return tuple(replace(layer, **self._found.get(layer.layer_id, {})) for layer in known)
