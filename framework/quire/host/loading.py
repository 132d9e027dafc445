"""Takes one plugin in, or leaves no trace of it.

The order is fixed: import, unknown hooks, registration, the call of `quire_providers`, API versions.
pluggy's own `load_setuptools_entrypoints` does none of this: one bad entry point ends the host, a
rejected plugin stays half registered, and a misspelt hook passes in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from quire.contract.provider import Point, Provider
from quire.facade import HostInfo
from quire.hooks import HOOK_ARGUMENTS, HOOK_NAMES
from quire.host.objects import first_line, is_path
from quire.host.reports import PluginReport, PluginStatus
from quire.host.sources import PluginSource
from quire.host.suggest import suggest
from quire.host.trace import Step
from quire.host.versions import refusal

RESERVED_NAMES = frozenset({"auto", "default"})
"""Names that mean something else where a provider's name is expected."""

HOW_TO_OFFER = "return a list such as [Provider('sampler', 'mine', 'package.module:Class', api=1)]"


class NotLoaded(Exception):
    """Loading ended early, with the status and the reason for the plugin's report."""

    def __init__(self, status: PluginStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def load_plugin(
    manager: pluggy.PluginManager,
    source: PluginSource,
    info: HostInfo,
    report: PluginReport,
    points: Mapping[str, Point],
) -> None:
    """Import and register a plugin and fill its report. Raises NotLoaded, and has changed nothing then."""
    try:
        with Step(f"import {report.label}"):
            plugin = source.load()
    except (Exception, SystemExit) as error:
        raise NotLoaded(PluginStatus.FAILED, first_line(error)) from error
    try:
        hooks = _hooks_of(manager, plugin)
        manager.register(plugin, name=report.name)
        with Step(f"call quire_providers of {report.name!r}") as step:
            report.providers = _checked(_offered(manager, plugin, info), report, points)
            step.result = ", ".join(f"{each.point} {each.name}" for each in report.providers) or "no providers"
        report.hooks = hooks
    except (Exception, SystemExit) as error:
        # pluggy enters a plugin before it validates it, so it must be taken out again.
        if manager.get_plugin(report.name) is plugin:
            manager.unregister(name=report.name)
        if isinstance(error, NotLoaded):
            raise
        raise NotLoaded(PluginStatus.REJECTED, _plain(error)) from error


def _plain(error: BaseException) -> str:
    """pluggy's complaint begins with two lines that only repeat the plugin and the hook's name."""
    if isinstance(error, pluggy.PluginValidationError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return "; ".join(line for line in lines if not line.startswith("Plugin "))
    return first_line(error)


def _hooks_of(manager: pluggy.PluginManager, plugin: object) -> tuple[str, ...]:
    """Names of the hooks that the plugin implements; a misspelt or unmarked one is an error."""
    found = []
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in HOOK_NAMES and callable(getattr(plugin, name, None)):
                reason = f"{name!r} is not marked with @hookimpl; write `@hookimpl`, from quire.plugin, above it"
                raise NotLoaded(PluginStatus.REJECTED, reason)
            continue
        if name not in HOOK_NAMES:
            raise NotLoaded(PluginStatus.REJECTED, f"unknown hook {name!r}; {suggest(name, HOOK_NAMES)}")
        if options["wrapper"] or options["hookwrapper"]:
            raise NotLoaded(PluginStatus.REJECTED, f"{name!r} is a hook wrapper; plugins are called one by one")
        if strangers := _arguments(getattr(plugin, name)) - set(HOOK_ARGUMENTS[name]):
            allowed = ", ".join(HOOK_ARGUMENTS[name]) or "nothing"
            reason = f"hook {name!r} takes {', '.join(sorted(strangers))}; it may take {allowed}"
            raise NotLoaded(PluginStatus.REJECTED, reason)
        found.append(name)
    return tuple(found)


def _arguments(hook: Any) -> set[str]:
    """Names of the arguments that a hook has to be given."""
    parameters = inspect.signature(hook).parameters.values()
    return {each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD}


def _offered(manager: pluggy.PluginManager, plugin: object, info: HostInfo) -> Iterable[Any]:
    """What the plugin's own `quire_providers` returns."""
    for implementation in manager.hook.quire_providers.get_hookimpls():
        if implementation.plugin is plugin:
            arguments = {"host": info}
            try:
                found: Any = implementation.function(*(arguments[name] for name in implementation.argnames))
                if found is None or isinstance(found, Provider):
                    what = "None" if found is None else "one Provider"
                    raise NotLoaded(PluginStatus.REJECTED, f"quire_providers returned {what}; {HOW_TO_OFFER}")
                return list(found)
            except NotLoaded:
                raise
            except (Exception, SystemExit) as error:
                raise NotLoaded(PluginStatus.REJECTED, f"quire_providers failed: {first_line(error)}") from error
    return []


def _checked(offered: Iterable[Any], report: PluginReport, points: Mapping[str, Point]) -> tuple[Provider, ...]:
    providers: list[Provider] = []
    for provider in offered:
        _check(provider, report, points)
        if any((other.point, other.name) == (provider.point, provider.name) for other in providers):
            raise NotLoaded(PluginStatus.REJECTED, f"it offers {provider.point} {provider.name!r} twice")
        providers.append(provider)
    return tuple(providers)


def _check(provider: Any, report: PluginReport, points: Mapping[str, Point]) -> None:
    """Raise NotLoaded unless this is a well-formed provider of a contract that the host serves."""
    if not isinstance(provider, Provider):
        what = type(provider).__name__
        raise NotLoaded(
            PluginStatus.REJECTED, f"quire_providers must yield Provider objects, not {what}; {HOW_TO_OFFER}"
        )
    point = points.get(provider.point)
    if point is None:
        reason = f"unknown extension point {provider.point!r}; {suggest(str(provider.point), points)}"
        raise NotLoaded(PluginStatus.INCOMPATIBLE, reason)
    if reason := refusal(provider, point, report):
        raise NotLoaded(PluginStatus.INCOMPATIBLE, reason)
    if problem := _malformed(provider):
        raise NotLoaded(PluginStatus.REJECTED, f"{provider.point} {provider.name!r}: {problem}")


def _malformed(provider: Provider) -> str:
    if not isinstance(provider.name, str) or not provider.name or provider.name in RESERVED_NAMES:
        return "a name is needed, and neither 'auto' nor 'default' can be one"
    if any(not (letter.isalnum() or letter in "_-.") for letter in provider.name):
        return "a name consists of letters, digits, '_', '-' and '.'"
    for field in ("target", "probe", "options"):
        value = getattr(provider, field)
        if not (is_path(value) or (value is None and field != "target")):
            return f"{field} is {value!r}; it must have the form 'package.module:attribute'"
    if not isinstance(provider.devices, frozenset) or not all(isinstance(name, str) for name in provider.devices):
        return f"devices is {provider.devices!r}; it must be a frozenset of device types"
    return "" if type(provider.priority) is int else f"priority is {provider.priority!r}; it must be an integer"
