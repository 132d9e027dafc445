"""Llama 2 and 3.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Llama config.json."""
    settings = settings_of(config)
    settings.must_be("pretraining_tp", 1)
    bias = settings.get("attention_bias", bool, False)
    return base_config(settings, qkv_bias=bias, out_bias=bias, mlp_bias=settings.get("mlp_bias", bool, False))


SPEC = decoder_spec(frozenset({"LlamaForCausalLM"}), config_from_hf)
