"""What the families' config.json files have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.models.decoder import DecoderConfig
from quire.models.settings import Settings

ROPE = "default"


def base_config(settings: Settings, *, tied: bool = False, **changes: Any) -> DecoderConfig:
    """A plain decoder as config.json describes it; `changes` are what the family adds."""
    num_layers = settings.get("num_hidden_layers", int)
    num_heads = settings.get("num_attention_heads", int)
    head_dim = settings.head_dim()
    config = DecoderConfig(
        vocab_size=settings.get("vocab_size", int),
        hidden_size=settings.get("hidden_size", int),
        intermediate_size=settings.get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        max_positions=settings.get("max_position_embeddings", int),
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        activation=changes.pop("activation", None) or settings.activation(),
        tied=settings.tied(tied),
        ropes=changes.pop("ropes", None) or {ROPE: settings.rope(head_dim)},
        rope_of_layer=(ROPE,) * num_layers,
        windows=(None,) * num_layers,
        scale=head_dim**-0.5,
    )
    return replace(config, **changes)


def windows_by_type(settings: Settings, window: int | None, default: tuple[str, ...]) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or the family's default pattern."""
    types = settings.layer_types() or default
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def settings_of(config: Mapping[str, Any], **defaults: Any) -> Settings:
    """Settings with the family's defaults, refusing what no native family honours."""
    settings = Settings(config, defaults)
    settings.must_be("is_encoder_decoder", False)
    settings.must_be("add_cross_attention", False)
    return settings
