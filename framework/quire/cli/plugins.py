"""`quire plugins`: what is installed, what it offers, and why something is or is not used."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli.console import note, print_table
from quire.cli.new import new
from quire.cli.session import open_session
from quire.contract.provider import POINTS, Provider
from quire.errors import ConfigError
from quire.host.sources import why_not_found
from quire.host.suggest import suggest
from quire.registry import PluginHost

if TYPE_CHECKING:
    from quire.testing.certify import Score

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def register(app: typer.Typer, explain: Callable[..., None]) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="See, test and write plugins.")
    group.command("list")(list_plugins)
    group.command("explain")(explain)
    group.command("test")(certify_plugin)
    group.command("new")(new)
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


def certify_plugin(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A plugin's name, as `quire plugins list` shows it.")],
    point: Annotated[str | None, typer.Option(help="Only this extension point.")] = None,
    as_json: AsJson = False,
    junit: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Leave a JUnit report per provider.")] = None,
) -> None:
    """Run the conformance kit on a plugin's providers. Exit code 1 if a check fails."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        raise ConfigError("the kit needs pytest and hypothesis", remedy="pip install 'quire[test]'")
    from quire.testing.certify import certify

    host = open_session(context, {}).host
    if name not in host.reports:
        shipped = {report.distribution: report.name for report in host.reports.values()}
        remedy = suggest(shipped.get(name, name), host.reports)
        remedy = remedy if remedy.startswith("did") else f"{remedy}; {why_not_found(name)}"
        raise ConfigError(f"there is no plugin called {name!r}", remedy=remedy)
    report = host.reports[name]
    providers = [provider for provider in report.providers if point in (None, provider.point)]
    if not providers:
        reason = f": {report.reason}" if report.reason else ""
        raise ConfigError(f"plugin {name!r} offers nothing to test{f' for {point}' if point else ''}{reason}")
    if junit is not None:
        junit.mkdir(parents=True, exist_ok=True)
    scores = []
    for provider in providers:
        note(f"testing {provider.point} {provider.name} ...")
        file = None if junit is None else junit / f"{provider.point}-{provider.name}.xml"
        scores.append(certify(host, provider, name, file))
    if as_json:
        typer.echo(json.dumps([asdict(score) for score in scores], indent=2))
    else:
        _print_scores(scores)
    if any(score.verdict == "failed" for score in scores):
        raise typer.Exit(1)


def _print_scores(scores: Sequence[Score]) -> None:
    numbers = [(str(score.passed), str(score.failed), str(score.skipped)) for score in scores]
    rows = [
        (score.point, score.name, score.verdict, *counts, score.reason)
        for score, counts in zip(scores, numbers, strict=True)
    ]
    print_table(("POINT", "NAME", "VERDICT", "PASSED", "FAILED", "SKIPPED", "WHY"), rows)
    for score in scores:
        for failure in score.failures:
            typer.echo(f"\n{score.point} {score.name}: {failure.check}\n  saw:  {failure.message}")
            typer.echo(f"  must: {failure.contract}\n  mend: {failure.advice}")


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
