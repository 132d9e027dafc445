"""Mistral: Llama with a sliding window in every layer, where the checkpoint sets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mistral config.json."""
    settings = settings_of(config, num_key_value_heads=8, sliding_window=4096)
    window = settings.optional("sliding_window", int)
    return base_config(settings, windows=(window,) * settings.get("num_hidden_layers", int))


SPEC = decoder_spec(frozenset({"MistralForCausalLM"}), config_from_hf)
