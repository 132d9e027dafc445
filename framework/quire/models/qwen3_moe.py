"""Qwen3-MoE: Qwen3 whose MLPs are sparse, except where the checkpoint says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.layers.moe import ExpertSizes
from quire.models.common import base_config, settings_of
from quire.models.decoder import DecoderConfig, decoder_spec
from quire.models.qwen2 import qwen_windows
from quire.models.settings import Settings


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen3-MoE config.json."""
    settings = settings_of(config, num_key_value_heads=4, sliding_window=4096, max_window_layers=28)
    bias = settings.get("attention_bias", bool, False)
    sizes = ExpertSizes(
        # transformers 5 writes the second name.
        num_experts=settings.optional("num_experts", int) or settings.get("num_local_experts", int),
        top_k=settings.get("num_experts_per_tok", int),
        hidden_size=settings.get("hidden_size", int),
        intermediate_size=settings.get("moe_intermediate_size", int),
        renormalize=settings.get("norm_topk_prob", bool, False),
        activation=settings.activation(),
    )
    return base_config(
        settings,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=qwen_windows(settings),
        experts=sizes,
        sparse_layers=_sparse_layers(settings, sizes.num_experts, config.get("mlp_only_layers") or ()),
    )


def _sparse_layers(settings: Settings, num_experts: int, dense: Any) -> frozenset[int]:
    step = settings.get("decoder_sparse_step", int, 1)
    layers = range(settings.get("num_hidden_layers", int))
    return frozenset(i for i in layers if num_experts > 0 and i not in dense and (i + 1) % step == 0)


SPEC = decoder_spec(frozenset({"Qwen3MoeForCausalLM"}), config_from_hf)
