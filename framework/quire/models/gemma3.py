"""Gemma 3, text: five windowed layers to each full one, with rotary settings of their own, and head norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.layers.rotary import RopeConfig
from quire.models.common import base_config, settings_of, windows_by_type
from quire.models.decoder import DecoderConfig, decoder_spec
from quire.models.settings import Settings

FULL, SLIDING = "full_attention", "sliding_attention"
PATTERN = 6


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 3 text config.json."""
    settings = settings_of(config, num_key_value_heads=4, head_dim=256)
    settings.must_be("use_bidirectional_attention", False)
    num_layers = settings.get("num_hidden_layers", int)
    bias = settings.get("attention_bias", bool, False)
    period = settings.get("sliding_window_pattern", int, PATTERN)
    pattern = settings.layer_types() or tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))
    return base_config(
        settings,
        tied=True,
        activation=settings.activation("hidden_activation"),
        ropes=_ropes(settings, config),
        rope_of_layer=pattern,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=windows_by_type(settings, settings.get("sliding_window", int, 4096), pattern),
        scale=settings.get("query_pre_attn_scalar", float) ** -0.5,
        attention_softcap=settings.optional("attn_logit_softcapping", float),
        final_softcap=settings.optional("final_logit_softcapping", float),
        norm_offset=1.0,
        embedding_scale=settings.get("hidden_size", int) ** 0.5,
        sandwich_norms=True,
    )


def _ropes(settings: Settings, config: Mapping[str, Any]) -> dict[str, RopeConfig]:
    head_dim = settings.head_dim()
    if FULL in (config.get("rope_parameters") or {}):
        return {kind: settings.rope(head_dim, layer_type=kind) for kind in (FULL, SLIDING)}
    # Older files: scaling applies to full layers alone, and windowed ones have a base of their own.
    positions = settings.get("max_position_embeddings", int)
    base = settings.get("rope_local_base_freq", float, 10000.0)
    local = RopeConfig(head_dim, head_dim, base, {}, positions, positions)
    return {FULL: settings.rope(head_dim, theta=1_000_000.0), SLIDING: local}


SPEC = decoder_spec(frozenset({"Gemma3ForCausalLM"}), config_from_hf)
