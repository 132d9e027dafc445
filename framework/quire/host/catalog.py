"""What the loaded plugins offer, and the choice among it.

An explicit choice never falls back: it works, or it is an error that says why. `auto` takes the
provider of highest priority that fits, and records why better ones do not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from quire.contract.provider import Point, Provider
from quire.errors import ConfigError
from quire.host.objects import first_line, import_object, why_not_a, why_not_imported
from quire.host.options import owner_of, validated
from quire.host.reports import Candidate, PluginReport, Rejection, Selection
from quire.host.sources import CORE, DISTRIBUTION, why_not_found
from quire.host.suggest import suggest
from quire.host.trace import Step
from quire.host.trace import logger as trace
from quire.host.versions import adapted

AUTO = "auto"

Check = Callable[[Any], Sequence[str]]
"""Given a provider's target: the reasons why it cannot be used; empty if it can."""


class Catalog:
    """The providers of all loaded plugins; `points` are the extension points that the host serves."""

    def __init__(self, points: Mapping[str, Point]) -> None:
        self.points = points
        self.reports: dict[str, PluginReport] = {}

    def providers(self, point: str) -> list[tuple[Provider, str]]:
        """All providers of a point with their plugin's name: highest priority first, then Quire's own, then by name.

        So what is installed beside Quire displaces nothing of it, unless it claims a higher priority.

        Raises:
            ConfigError: there is no such point.
        """
        if point not in self.points:
            raise ConfigError(f"{point!r} is not an extension point", remedy=suggest(point, self.points))
        found = [pair for pair in self._owned() if pair[0].point == point]
        ours = {report.name for report in self.reports.values() if report.distribution == DISTRIBUTION}
        return sorted(found, key=lambda pair: (-pair[0].priority, pair[1] not in ours, pair[0].name, pair[1]))

    def select(
        self, point: str, wanted: str = AUTO, *, device_type: str | None = None, check: Check | None = None
    ) -> Selection:
        """The provider to use: the named one, or for `auto` the one of highest priority that fits.

        Args:
            point: the extension point.
            wanted: `auto`, a provider's name, or `plugin:name`. A named one works or is an error.
            device_type: torch device type that it must run on.
            check: further reasons why a target cannot be used.

        Raises:
            ConfigError: a named one is unknown, ambiguous or cannot be used; or none fits.
        """
        candidates = self.providers(point) if wanted == AUTO else [self._named(point, wanted)]
        rejected: list[Rejection] = []
        for position, (provider, plugin) in enumerate(candidates):
            target, reasons = self._try(provider, device_type, check)
            if not reasons:
                trace.debug("select %s (%s): %s:%s", point, wanted, plugin, provider.name)
                rest = tuple((other.name, owner) for other, owner in candidates[position + 1 :])
                return Selection(provider, plugin, target, tuple(rejected), rest)
            rejected.append(Rejection(provider, plugin, reasons))
        if wanted != AUTO:
            reasons_text = "; ".join(rejected[0].reasons)
            raise ConfigError(
                f"{point} {wanted!r} cannot be used: {reasons_text}", remedy=self._alternatives(candidates[0])
            )
        details = " | ".join(f"{item.provider.name}: {'; '.join(item.reasons)}" for item in rejected)
        raise ConfigError(
            f"no {point} can be used here" + (f": {details}" if details else ": no plugin provides one"),
            remedy="`quire plugins list` shows what is installed",
        )

    def load(self, point: str, wanted: str) -> Any:
        """The target of a named provider. Raises ConfigError as `select` does."""
        return self.select(point, wanted).target

    def explain(
        self, point: str, wanted: str = AUTO, *, device_type: str | None = None, check: Check | None = None
    ) -> list[Candidate]:
        """Every provider of a point with the reason why `select` would or would not take it."""
        named = None if wanted == AUTO else self._named(point, wanted)
        table: list[Candidate] = []
        winner: str | None = None
        for provider, plugin in self.providers(point):
            _, reasons = self._try(provider, device_type, check)
            chosen = not reasons and winner is None and named in (None, (provider, plugin))
            note = ""
            if chosen:
                winner = f"{plugin}:{provider.name}"
            elif not reasons:
                note = f"{wanted!r} was asked for" if named else f"{winner} stands before it"
            table.append(Candidate(provider, plugin, chosen, reasons, note))
        return table

    def availability(self, provider: Provider) -> str:
        """Why this machine cannot run the provider, by its own probe; empty if it can, or has no probe."""
        return "; ".join(_probe(provider))

    def blame(self, error: BaseException) -> str:
        """The plugin whose code raised, as ` in plugin 'x' (x 1.0)`; empty if the traceback meets none, or the core's.

        That is the innermost frame of any plugin: torch's own frames lie below it.
        """
        labels = {
            p.target.partition(".")[0].partition(":")[0]: r.label for r in self.reports.values() for p in r.providers
        }
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        owners = [module.partition(".")[0] for module in modules if module.partition(".")[0] in labels]
        owner = next((name for name in reversed(owners)), "quire")
        return "" if owner == "quire" else f" in {labels[owner]}"

    def _owned(self) -> list[tuple[Provider, str]]:
        return [(provider, report.name) for report in self.reports.values() for provider in report.providers]

    def _named(self, point: str, wanted: str) -> tuple[Provider, str]:
        every = self.providers(point)
        found = [(p, plugin) for p, plugin in every if wanted in (p.name, f"{plugin}:{p.name}")]
        if len(found) == 1:
            return found[0]
        if found:
            full = [f"{plugin}:{provider.name}" for provider, plugin in found]
            raise ConfigError(f"{point} {wanted!r} is offered by several plugins", remedy=f"name one of {full}")
        broken = [f"{r.name} ({r.status}: {r.reason})" for r in self.reports.values() if r.reason]
        note = f"; not loaded: {', '.join(broken)}" if broken else ""
        raise ConfigError(f"there is no {point} {wanted!r}{note}", remedy=self._found_instead(wanted, every))

    def _found_instead(self, wanted: str, offered: Sequence[tuple[Provider, str]]) -> str:
        """What to do about a name that no provider of the point has."""
        names = [provider.name for provider, _ in offered]
        ours = [provider.name for provider, plugin in offered if self.reports[plugin].distribution == wanted]
        remedy = suggest(ours[0] if ours else wanted, names)
        if remedy.startswith("did"):
            return remedy
        report = self.reports.get(wanted)
        if report is not None and report.reason:
            return f"mend plugin {wanted!r}; {remedy}"
        return f"{remedy}; {why_not_found(wanted)}"

    def _alternatives(self, refused: tuple[Provider, str]) -> str:
        names = [
            provider.name for provider, plugin in self.providers(refused[0].point) if (provider, plugin) != refused
        ]
        others = f"use auto or one of {names}" if names else "there is no other"
        return others if refused[1] == CORE else f"mend plugin {refused[1]!r}, or {others}"

    def _try(self, provider: Provider, device_type: str | None, check: Check | None) -> tuple[Any, tuple[str, ...]]:
        """The provider's target, and the reasons why it cannot be used."""
        with Step(f"consider {provider.point} {provider.name!r}, priority {provider.priority}") as step:
            target, reasons = self._target(provider, device_type, check)
            step.result = "; ".join(reasons) or "can be used"
        return target, reasons

    def _target(self, provider: Provider, device_type: str | None, check: Check | None) -> tuple[Any, tuple[str, ...]]:
        if device_type is not None and provider.devices and device_type not in provider.devices:
            return None, (f"runs on {', '.join(sorted(provider.devices))}, not on {device_type}",)
        if reasons := _probe(provider):
            return None, reasons
        try:
            with Step(f"import {provider.target}"):
                target = import_object(provider.target)
        except (Exception, SystemExit) as error:
            return None, (f"its target {why_not_imported(provider.target, error)}",)
        point = self.points[provider.point]
        try:
            target = adapted(target, provider.api, point)
            reasons = (*why_not_a(point, target),)
            return target, reasons or (tuple(check(target)) if check is not None else ())
        except (Exception, SystemExit) as error:
            return None, (first_line(error),)

    def options_for(self, provider: Provider, options: Mapping[str, Mapping[str, Any]]) -> BaseModel | None:
        """The provider's validated options from the configuration's `plugin_options`; None if it takes none.

        Options stand under the provider's name, or where that is not unique `point.name` or `plugin:name`.

        Raises:
            ConfigError: an option is unknown or has a bad value.
        """
        pair = next(pair for pair in self._owned() if pair[0] is provider)
        if provider.options is None:
            return None
        keys = [key for key in options if owner_of(key, self._owned()) == pair]
        if len(keys) > 1:
            raise ConfigError(f"the options of {provider.name!r} are given twice, under {keys}")
        return validated(provider, pair[1], options[keys[0]] if keys else {})

    def check_option_names(self, options: Mapping[str, Any]) -> None:
        """Validate all of `plugin_options`, also those of providers that are not in use. Raises ConfigError."""
        for key in options:
            self.options_for(self.owner_of_options(key)[0], options)

    def owner_of_options(self, key: str) -> tuple[Provider, str]:
        """The provider that `plugin_options` means by this key. Raises ConfigError if there is no one such."""
        return owner_of(key, self._owned())


def _probe(provider: Provider) -> tuple[str, ...]:
    """The reason that the provider's probe gives; empty if it gives none."""
    if provider.probe is None:
        return ()
    try:
        with Step(f"probe {provider.probe}") as step:
            reason = import_object(provider.probe)()
            step.result = "can run here" if reason is None else str(reason)
    except (Exception, SystemExit) as error:
        return (f"its probe failed: {first_line(error)}",)
    return () if reason is None else (str(reason),)
