"""Phi-3 and Phi-4: fused projections in the checkpoint, partial and long rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import ROPE, base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Phi-3 config.json."""
    settings = settings_of(config, rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    settings.must_be("attention_bias", False)
    window = settings.optional("sliding_window", int)
    num_layers = settings.get("num_hidden_layers", int)
    rope = settings.rope(settings.head_dim(), partial=True, renamed={"su": "longrope", "yarn": "longrope"})
    return base_config(settings, fused_names=True, windows=(window,) * num_layers, ropes={ROPE: rope})


SPEC = decoder_spec(frozenset({"Phi3ForCausalLM"}), config_from_hf)
