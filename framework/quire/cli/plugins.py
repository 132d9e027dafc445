"""`quire plugins`: what is installed, what it offers, and why something is or is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quire.cli.console import print_table
from quire.cli.session import open_session
from quire.contract.provider import POINTS, Provider
from quire.registry import PluginHost

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def register(app: typer.Typer, explain: Callable[..., None]) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="See what plugins are there and what they offer.")
    group.command("list")(list_plugins)
    group.command("explain")(explain)
    app.add_typer(group, name="plugins")


def list_plugins(context: typer.Context, as_json: AsJson = False) -> None:
    """List plugins with their status, and the providers of those that are loaded."""
    host = open_session(context, {}).host
    if as_json:
        typer.echo(json.dumps([_plugin(host, name) for name in host.reports], indent=2))
        return
    reports = host.reports.values()
    rows = [(r.name, r.distribution, r.version, str(r.status), str(len(r.providers)), r.reason) for r in reports]
    print_table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATUS", "PROVIDERS", "REASON"), rows)
    typer.echo()
    print_table(
        ("POINT", "NAME", "PLUGIN", "TIER", "API", "PRIORITY", "AVAILABLE", "SUMMARY"),
        [_row(host, provider, plugin) for point in POINTS for provider, plugin in host.providers(point)],
    )


def _row(host: PluginHost, provider: Provider, plugin: str) -> tuple[str, ...]:
    reason = host.availability(provider)
    available = f"no: {reason}" if reason else "yes"
    tier = POINTS[provider.point].tier
    numbers = (str(provider.api), str(provider.priority))
    return (provider.point, provider.name, plugin, tier, *numbers, available, provider.summary)


def _plugin(host: PluginHost, name: str) -> dict[str, Any]:
    report = host.reports[name]
    return {
        "name": report.name,
        "distribution": report.distribution,
        "version": report.version,
        "status": str(report.status),
        "reason": report.reason,
        "hooks": list(report.hooks),
        "providers": [_provider(host, provider) for provider in report.providers],
    }


def _provider(host: PluginHost, provider: Provider) -> dict[str, Any]:
    return {
        "point": provider.point,
        "name": provider.name,
        "tier": POINTS[provider.point].tier,
        "api": provider.api,
        "priority": provider.priority,
        "devices": sorted(provider.devices),
        "target": provider.target,
        "options": provider.options,
        "unavailable": host.availability(provider),
        "summary": provider.summary,
    }
