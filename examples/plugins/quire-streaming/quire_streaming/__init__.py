"""Attention that can keep to the first tokens and a window, for Quire."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """What this plugin offers."""
    yield Provider(
        "attention",
        "streaming",
        "quire_streaming.attention:StreamingAttention",
        api=1,
        options="quire_streaming.attention:StreamingOptions",
        summary="exact, or attention sinks and a window",
    )
