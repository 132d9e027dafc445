"""A scheduler policy for Quire that runs the shortest job first."""

from __future__ import annotations

from collections.abc import Iterable

from quire.plugin import Provider, hookimpl


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """What this plugin offers."""
    yield Provider(
        "scheduler_policy",
        "shortest_job",
        "quire_shortest_job.policy:ShortestJobPolicy",
        api=1,
        options="quire_shortest_job.policy:ShortestJobOptions",
        summary="least work first, with ageing",
    )
