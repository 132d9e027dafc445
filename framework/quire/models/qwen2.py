"""Qwen2 and Qwen2.5: biases on q, k and v, and a window in the upper layers if it is switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import base_config, settings_of, windows_by_type
from quire.models.decoder import DecoderConfig, decoder_spec
from quire.models.settings import Settings


def qwen_windows(settings: Settings) -> tuple[int | None, ...]:
    """Windows of Qwen's layers: from `max_window_layers` on, if `use_sliding_window` is set."""
    num_layers = settings.get("num_hidden_layers", int)
    if not settings.get("use_sliding_window", bool, False):
        return (None,) * num_layers
    first = settings.get("max_window_layers", int, num_layers)
    default = tuple("sliding_attention" if index >= first else "full_attention" for index in range(num_layers))
    return windows_by_type(settings, settings.optional("sliding_window", int), default)


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen2 config.json."""
    settings = settings_of(config, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)
    return base_config(settings, qkv_bias=True, windows=qwen_windows(settings))


SPEC = decoder_spec(frozenset({"Qwen2ForCausalLM"}), config_from_hf)
