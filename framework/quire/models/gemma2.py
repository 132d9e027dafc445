"""Gemma 2: norms before and behind each block, capped logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.common import base_config, settings_of, windows_by_type
from quire.models.decoder import DecoderConfig, decoder_spec


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 2 config.json."""
    settings = settings_of(
        config, num_key_value_heads=4, head_dim=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    )
    settings.must_be("use_bidirectional_attention", False)
    num_layers = settings.get("num_hidden_layers", int)
    bias = settings.get("attention_bias", bool, False)
    pattern = tuple("full_attention" if index % 2 else "sliding_attention" for index in range(num_layers))
    return base_config(
        settings,
        tied=True,
        activation=settings.activation("hidden_activation"),
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


SPEC = decoder_spec(frozenset({"Gemma2ForCausalLM"}), config_from_hf)
