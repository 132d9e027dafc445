"""Loads plugins, each alone, and selects implementations. No module state: a host is built and passed on.

An entry point is taken in this order: block list, import, unknown hooks, registration, the call of
`quire_providers`, API versions. The first that goes wrong is recorded as the plugin's status, the
plugin is rolled back, and the others go on.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pluggy
from pydantic import BaseModel, ValidationError

from quire.contract.provider import POINTS, Provider
from quire.errors import ConfigError, PluginError
from quire.facade import HostInfo
from quire.hooks import HOOK_NAMES, PROJECT, HookSpecs
from quire.version import __version__

logger = logging.getLogger(__name__)

GROUP = "quire"
CORE = "core"
AUTO = "auto"
MAX_HOOK_FAILURES = 3


class EntryPoint(Protocol):
    """What is used of `importlib.metadata.EntryPoint`."""

    @property
    def name(self) -> str: ...
    def load(self) -> Any: ...


@dataclass(slots=True)
class PluginReport:
    """What became of one plugin.

    Attributes:
        name: of the entry point.
        distribution: that installed it. version: of the distribution.
        status: `loaded`, `blocked`, `failed to import`, `rejected`, `failed` or `incompatible`.
        reason: why it is not loaded.
        providers: what it offers.
    """

    name: str
    distribution: str = "?"
    version: str = "?"
    status: str = "loaded"
    reason: str = ""
    providers: tuple[Provider, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """A provider that was not chosen, and why."""

    provider: Provider
    plugin: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The provider chosen for a point.

    Attributes:
        provider: the choice. plugin: who offers it. target: its imported target.
        rejected: candidates of higher priority that could not be used.
        passed_over: candidates that were not needed.
    """

    provider: Provider
    plugin: str
    target: Any
    rejected: tuple[Rejection, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()


Check = Callable[[Any], Sequence[str]]
"""Given a provider's target: the reasons why it cannot be used; empty if it can."""


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Which plugins to load.

    Attributes:
        blocked: names that are not loaded (`-p no:NAME`).
        allowed: if not None, the only names that are loaded beside the core.
        strict: a plugin that fails to load is an error.
        files: Python files that are plugins (`--plugin FILE`).
    """

    blocked: frozenset[str] = frozenset()
    allowed: frozenset[str] | None = None
    strict: bool = False
    files: tuple[Path, ...] = ()


class PluginHost:
    """The loaded plugins."""

    def __init__(self, entry_points: Iterable[EntryPoint], options: HostOptions) -> None:
        self._options = options
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        self._hook_failures: dict[str, int] = {}
        self.reports: dict[str, PluginReport] = {}
        self.info = HostInfo(__version__, {name: (point.oldest, point.current) for name, point in POINTS.items()})
        for entry_point in (_CoreEntryPoint(), *entry_points):
            self._take(entry_point)
        for path in options.files:
            self._take(_FileEntryPoint(path))

    # Loading ----------------------------------------------------------------------------------

    def _take(self, entry_point: EntryPoint) -> None:
        distribution = getattr(entry_point, "dist", None)
        name = entry_point.name
        if name in self.reports:
            name = f"{name}@{getattr(distribution, 'name', len(self.reports))}"
        report = self.reports[name] = PluginReport(
            name, getattr(distribution, "name", "?"), getattr(distribution, "version", "?")
        )
        if reason := self._blocked(entry_point.name):
            report.status, report.reason = "blocked", reason
            return
        try:
            plugin = entry_point.load()
        except (Exception, SystemExit) as error:
            self._fail(report, "failed to import", _describe(error))
            return
        self._register(plugin, report)

    def _blocked(self, name: str) -> str:
        if name == CORE:
            return ""
        if name in self._options.blocked:
            return f"blocked by -p no:{name} or the configuration"
        if self._options.allowed is not None and name not in self._options.allowed:
            return "not in the configuration's list of allowed plugins"
        return ""

    def _register(self, plugin: Any, report: PluginReport) -> None:
        if problem := self._unknown_hook(plugin):
            self._fail(report, "rejected", problem)
            return
        try:
            self._manager.register(plugin, name=report.name)
        except Exception as error:
            if self._manager.has_plugin(report.name):  # pluggy registers before it validates
                self._manager.unregister(name=report.name)
            self._fail(report, "rejected", _describe(error))
            return
        try:
            report.providers = self._call_providers(plugin)
        except Exception as error:
            self._manager.unregister(plugin)
            status = "incompatible" if isinstance(error, _Incompatible) else "failed"
            self._fail(report, status, str(error) if isinstance(error, _Incompatible) else _describe(error))

    def _unknown_hook(self, plugin: Any) -> str:
        """pluggy ignores a misspelt hook; it must not pass in silence."""
        for name in dir(plugin):
            marked = self._manager.parse_hookimpl_opts(plugin, name) is not None
            if marked and name not in HOOK_NAMES:
                close = difflib.get_close_matches(name, HOOK_NAMES, 1)
                return f"unknown hook {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
        return ""

    def _call_providers(self, plugin: Any) -> tuple[Provider, ...]:
        for implementation in self._manager.hook.quire_providers.get_hookimpls():
            if implementation.plugin is plugin:
                arguments = {"host": self.info}
                found = implementation.function(*(arguments[name] for name in implementation.argnames))
                providers = tuple(found)
                for provider in providers:
                    _check_provider(provider)
                return providers
        return ()

    def _fail(self, report: PluginReport, status: str, reason: str) -> None:
        report.status, report.reason, report.providers = status, reason, ()
        message = f"plugin {report.name!r} ({report.distribution} {report.version}) {status}: {reason}"
        if self._options.strict:
            raise PluginError(message, remedy=f"mend it, or leave it out with -p no:{report.name}")
        logger.warning("%s; it is ignored, -p no:%s silences this", message, report.name)

    # Selecting --------------------------------------------------------------------------------

    def providers(self, point: str) -> list[tuple[Provider, str]]:
        """All providers of a point with their plugin's name, highest priority first."""
        if point not in POINTS:
            raise ConfigError(f"{point!r} is not an extension point", remedy=_suggest(point, POINTS))
        found = [
            (provider, report.name)
            for report in self.reports.values()
            for provider in report.providers
            if provider.point == point
        ]
        return sorted(found, key=lambda pair: -pair[0].priority)

    def select(
        self, point: str, wanted: str = AUTO, *, device_type: str | None = None, check: Check | None = None
    ) -> Selection:
        """The provider to use: the named one, or for `auto` the one of highest priority that fits.

        Raises:
            ConfigError: a named one is unknown, ambiguous or cannot be used; or none fits.
        """
        candidates = self.providers(point) if wanted == AUTO else [self._named(point, wanted)]
        rejected: list[Rejection] = []
        for position, (provider, plugin) in enumerate(candidates):
            target, reasons = self._try(provider, device_type, check)
            if not reasons:
                rest = tuple((other.name, owner) for other, owner in candidates[position + 1 :])
                return Selection(provider, plugin, target, tuple(rejected), rest)
            rejected.append(Rejection(provider, plugin, reasons))
        if wanted != AUTO:
            reasons_text = "; ".join(rejected[0].reasons)
            raise ConfigError(f"{point} {wanted!r} cannot be used: {reasons_text}", remedy=self._alternatives(point))
        details = " | ".join(f"{item.provider.name}: {'; '.join(item.reasons)}" for item in rejected)
        raise ConfigError(
            f"no {point} can be used here" + (f": {details}" if details else ""),
            remedy="`quire plugins list` shows what is installed",
        )

    def load(self, point: str, wanted: str) -> Any:
        """The target of a named provider."""
        return self.select(point, wanted).target

    def options_for(self, provider: Provider, options: Mapping[str, Mapping[str, Any]]) -> BaseModel | None:
        """The provider's validated options from the configuration's `plugin_options`.

        Raises:
            ConfigError: an option is unknown or has a bad value, or the provider takes none.
        """
        given = options.get(provider.name)
        if provider.options is None:
            if given:
                raise ConfigError(f"{provider.point} {provider.name!r} takes no options; got {sorted(given)}")
            return None
        model: type[BaseModel] = import_target(provider.options)
        try:
            return model(**(given or {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"option {key!r} of {provider.point} {provider.name!r}: {first['msg']}",
                remedy=_suggest(key, model.model_fields),
            ) from None

    def check_option_names(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigError for options of a provider that does not exist."""
        names = {provider.name for report in self.reports.values() for provider in report.providers}
        for name in options:
            if name not in names:
                raise ConfigError(
                    f"plugin_options names {name!r}, which no plugin provides", remedy=_suggest(name, names)
                )

    def _named(self, point: str, wanted: str) -> tuple[Provider, str]:
        every = self.providers(point)
        found = [(p, plugin) for p, plugin in every if wanted in (p.name, f"{plugin}:{p.name}")]
        if len(found) == 1:
            return found[0]
        if found:
            full = [f"{plugin}:{provider.name}" for provider, plugin in found]
            raise ConfigError(f"{point} {wanted!r} is offered by several plugins", remedy=f"name one of {full}")
        broken = [f"{r.name} ({r.status}: {r.reason})" for r in self.reports.values() if r.status != "loaded"]
        note = f"; not loaded: {', '.join(broken)}" if broken else ""
        raise ConfigError(f"there is no {point} {wanted!r}{note}", remedy=_suggest(wanted, [p.name for p, _ in every]))

    def _alternatives(self, point: str) -> str:
        names = [provider.name for provider, _ in self.providers(point)]
        return f"use auto or one of {names}"

    def _try(self, provider: Provider, device_type: str | None, check: Check | None) -> tuple[Any, tuple[str, ...]]:
        """The provider's target, and the reasons why it cannot be used."""
        if device_type is not None and provider.devices and device_type not in provider.devices:
            return None, (f"runs on {sorted(provider.devices)}, not on {device_type!r}",)
        try:
            if provider.probe is not None and (reason := import_target(provider.probe)()):
                return None, (str(reason),)
            target = import_target(provider.target)
            return target, tuple(check(target)) if check is not None else ()
        except Exception as error:
            return None, (_describe(error),)

    # Hooks at run time ------------------------------------------------------------------------

    def has_hook(self, name: str) -> bool:
        """Whether any plugin implements the hook."""
        return bool(getattr(self._manager.hook, name).get_hookimpls())

    def notify(self, name: str, **arguments: Any) -> None:
        """Call an observing hook of each plugin alone; one that keeps failing is muted."""
        for implementation in getattr(self._manager.hook, name).get_hookimpls():
            key = f"{implementation.plugin_name}.{name}"
            if self._hook_failures.get(key, 0) >= MAX_HOOK_FAILURES:
                continue
            try:
                implementation.function(*(arguments[argument] for argument in implementation.argnames))
            except Exception:
                self._hook_failures[key] = self._hook_failures.get(key, 0) + 1
                muted = "; it is muted from now on" if self._hook_failures[key] == MAX_HOOK_FAILURES else ""
                logger.warning("hook %s of plugin %r failed%s", name, implementation.plugin_name, muted, exc_info=True)

    def config_defaults(self, config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
        """Field -> (suggested value, plugin). Of several suggestions the last loaded plugin's wins."""
        suggested: dict[str, tuple[Any, str]] = {}
        for implementation in self._manager.hook.quire_config_defaults.get_hookimpls():
            arguments = {"config": config}
            name = implementation.plugin_name
            try:
                values = implementation.function(*(arguments[argument] for argument in implementation.argnames))
                suggested.update({field: (value, name) for field, value in dict(values or {}).items()})
            except Exception as error:
                raise PluginError(
                    f"hook quire_config_defaults of plugin {name!r} failed: {_describe(error)}",
                    remedy=f"leave it out with -p no:{name}",
                ) from error
        return suggested

    def extend_cli(self, app: Any) -> None:
        """Let plugins add subcommands; one that fails is reported and left out."""
        self.notify("quire_cli", app=app)


@dataclass(frozen=True, slots=True)
class _CoreEntryPoint:
    """The core's own providers come through the same door as anybody's."""

    name: str = CORE
    dist: Any = field(default_factory=lambda: _Distribution("quire", __version__))

    def load(self) -> ModuleType:
        return importlib.import_module("quire.builtin")


@dataclass(frozen=True, slots=True)
class _Distribution:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class _FileEntryPoint:
    """A plugin that is one Python file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def dist(self) -> _Distribution:
        return _Distribution(str(self.path), "-")

    def load(self) -> ModuleType:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file")
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{self.path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        # Providers name their target by module, so the file must be importable under its name.
        sys.modules[self.name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[self.name]
            raise
        return module


class _Incompatible(Exception):
    """The plugin was written for another contract."""


def build_host(options: HostOptions | None = None) -> PluginHost:
    """Load the core's providers, the installed plugins and the named files."""
    return PluginHost(importlib.metadata.entry_points(group=GROUP), options or HostOptions())


def import_target(path: str) -> Any:
    """Import `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check_provider(provider: object) -> None:
    if not isinstance(provider, Provider):
        raise TypeError(f"quire_providers must yield Provider objects, not {type(provider).__name__}")
    point = POINTS.get(provider.point)
    if point is None:
        raise _Incompatible(f"unknown extension point {provider.point!r}; {_suggest(provider.point, POINTS)}")
    if not point.oldest <= provider.api <= point.current:
        served = f"{point.oldest}" if point.oldest == point.current else f"{point.oldest} to {point.current}"
        raise _Incompatible(
            f"{provider.point}:{provider.name} needs API version {provider.api}; this host serves {served}"
        )


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {names}"


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
