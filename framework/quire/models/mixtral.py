"""Mixtral: Mistral with sparse MLPs in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.layers.moe import ExpertSizes
from quire.models.common import base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mixtral config.json."""
    settings = settings_of(config, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6)
    num_layers = settings.get("num_hidden_layers", int)
    sizes = ExpertSizes(
        num_experts=settings.get("num_local_experts", int),
        top_k=settings.get("num_experts_per_tok", int),
        hidden_size=settings.get("hidden_size", int),
        intermediate_size=settings.get("intermediate_size", int),
        renormalize=True,
        activation=settings.activation(),
    )
    return base_config(
        settings,
        windows=(settings.optional("sliding_window", int),) * num_layers,
        experts=sizes,
        sparse_layers=frozenset(range(num_layers)),
        expert_names="mixtral",
    )


SPEC = decoder_spec(frozenset({"MixtralForCausalLM"}), config_from_hf)
