"""Qwen3: RMS norms on query and key heads, no biases by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec
from quire.models.qwen2 import qwen_windows


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen3 config.json."""
    settings = settings_of(config, num_key_value_heads=32, head_dim=128, sliding_window=4096, max_window_layers=28)
    bias = settings.get("attention_bias", bool, False)
    return base_config(settings, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=qwen_windows(settings))


SPEC = decoder_spec(frozenset({"Qwen3ForCausalLM"}), config_from_hf)
