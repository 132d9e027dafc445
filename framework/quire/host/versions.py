"""API versions of extension points: what is served as it is, what through adapters, what no more.

A point serves the versions from `oldest` to `current`. A target of an older version is turned into one of
the next, step by step, by the point's adapters, which live in the core; where a version has none, the
contract only grew and its targets serve as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.contract.provider import Point, Provider
from quire.host.objects import import_object
from quire.host.reports import PluginReport


def refusal(provider: Provider, point: Point, report: PluginReport) -> str:
    """Why the host cannot serve the provider's version, and the line to type; empty if it can."""
    if type(provider.api) is int and point.oldest <= provider.api <= point.current:
        return ""
    served = f"{point.oldest}" if point.oldest == point.current else f"{point.oldest} to {point.current}"
    reason = f"{provider.point} {provider.name!r} needs API version {provider.api}; this host serves {served}"
    if type(provider.api) is not int:
        return f"{reason}; api must be an integer"
    if provider.api > point.current:
        return f"{reason}; pip install --upgrade quire"
    return f"{reason}; {_upgrade(report)}"


def notice(provider: Provider, point: Point, report: PluginReport) -> str:
    """What is to be said of a provider that was written for an older version; empty for one that was not."""
    if provider.api == point.current:
        return ""
    return (
        f"{provider.point} {provider.name!r} was written for API version {provider.api}; {point.current} is current, "
        f"{point.oldest} the oldest that is served, and it will be served no more after two minor releases; "
        f"{_upgrade(report)}"
    )


def adapted(target: Any, version: int, point: Point) -> Any:
    """A target of an older version as one of the current. Raises whatever an adapter raises."""
    adapters: Mapping[int, str] = point.adapters
    for older in range(version, point.current):
        if older in adapters:
            target = import_object(adapters[older])(target)
    return target


def _upgrade(report: PluginReport) -> str:
    is_file = report.distribution.endswith(".py") or not report.distribution
    return "bring the file up to date" if is_file else f"pip install --upgrade {report.distribution}"
