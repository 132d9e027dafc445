"""Metrics of Quire as lines of JSON."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """What this plugin offers."""
    yield Provider(
        "metrics_sink",
        "json_lines",
        "quire_json_lines.sink:JsonLinesSink",
        api=1,
        options="quire_json_lines.sink:JsonLinesOptions",
        summary="a line of JSON per request",
    )
