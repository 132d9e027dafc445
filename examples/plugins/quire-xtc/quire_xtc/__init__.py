"""A sampler for Quire that can exclude top choices."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """What this plugin offers."""
    yield Provider(
        "sampler",
        "xtc",
        "quire_xtc.sampler:XtcSampler",
        api=1,
        options="quire_xtc.sampler:XtcOptions",
        summary="as torch, or with the top choices excluded",
    )
