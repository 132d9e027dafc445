"""Loads plugins, each alone, and selects implementations. No module state: a host is built and passed on.

The core comes first, then the installed entry points by name, then single files. Whatever goes wrong
with one of them is recorded as its status, the plugin is rolled back, and the others go on.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
from pydantic import BaseModel

from quire.contract.provider import POINTS, Point
from quire.errors import ConfigError, PluginError
from quire.facade import HostInfo
from quire.hooks import PROJECT, HookSpecs
from quire.host.catalog import AUTO, Catalog, Check
from quire.host.loading import NotLoaded, load_plugin
from quire.host.objects import first_line
from quire.host.observers import Observers
from quire.host.reports import Candidate, PluginReport, PluginStatus, Rejection, Selection
from quire.host.sources import CORE, GROUP, EntryPoint, PluginSource, core_source, file_source, installed_sources
from quire.host.suggest import suggest
from quire.host.trace import Step
from quire.host.trace import logger as trace
from quire.host.versions import notice
from quire.version import __version__

__all__ = [
    "AUTO",
    "Candidate",
    "Check",
    "HostOptions",
    "PluginHost",
    "PluginReport",
    "PluginStatus",
    "Rejection",
    "Selection",
    "build_host",
]

logger = logging.getLogger(__name__)


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


class PluginHost(Catalog):
    """The loaded plugins.

    Args:
        entry_points: the installed plugins.
        options: which of them to load.
        points: the extension points to serve; the core's own.

    Raises:
        ConfigError: the core is blocked, or a file of `options.files` cannot be a plugin.
        PluginError: a plugin failed to load and `options.strict` is set.
    """

    def __init__(
        self, entry_points: Iterable[EntryPoint], options: HostOptions, points: Mapping[str, Point] = POINTS
    ) -> None:
        super().__init__(points)
        if CORE in options.blocked:
            raise ConfigError("the core cannot be blocked", remedy=f"remove -p no:{CORE}")
        self._options = options
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        self._observers: dict[str, Observers] = {}
        self.info = HostInfo(__version__, {name: (point.oldest, point.current) for name, point in points.items()})
        files = [file_source(Path(path)) for path in options.files]
        for source in (core_source(), *installed_sources(entry_points), *files):
            self._take(source)
        self._check_names()

    @property
    def options(self) -> HostOptions:
        """Which plugins were to be loaded."""
        return self._options

    # Loading ----------------------------------------------------------------------------------

    def _take(self, source: PluginSource) -> None:
        report = PluginReport(self._free_name(source), source.distribution, source.version)
        taken = source.name in self.reports
        self.reports[report.name] = report
        if reason := self._blocked(source.name):
            report.status, report.reason = PluginStatus.BLOCKED, reason
            trace.debug("%s: %s", report.label, reason)
            return
        if taken:
            owner = self.reports[source.name]
            self._fail(report, NotLoaded(PluginStatus.REJECTED, f"its name is taken by {owner.label}"))
            return
        try:
            load_plugin(self._manager, source, self.info, report, self.points)
        except NotLoaded as error:
            self._fail(report, error)
            return
        for provider in report.providers:
            if said := notice(provider, self.points[provider.point], report):
                logger.warning("%s: %s", report.label, said)

    def _free_name(self, source: PluginSource) -> str:
        """The source's name; for the second of one name, a name to report it under."""
        name, count = source.name, 2
        while name in self.reports:
            name, count = f"{source.name}@{source.distribution or '?'}" + (f"#{count}" if count > 2 else ""), count + 1
        return name

    def _blocked(self, name: str) -> str:
        if name == CORE:
            return ""
        if name in self._options.blocked:
            return f"blocked by -p no:{name} or the configuration"
        if self._options.allowed is not None and name not in self._options.allowed:
            return "not in the configuration's list of allowed plugins"
        return ""

    def _fail(self, report: PluginReport, error: NotLoaded) -> None:
        report.status, report.reason, report.providers = error.status, error.reason, ()
        message = f"{report.label} {error.status}: {error.reason}"
        name = report.name.partition("@")[0]
        if self._options.strict:
            raise PluginError(message, remedy=f"mend it, or leave it out with -p no:{name}") from error
        logger.warning("%s; it is ignored, -p no:%s silences this", message, name)

    def _check_names(self) -> None:
        """A name in the block or allow list that no plugin has is most likely misspelt."""
        for listed in (*self._options.blocked, *(self._options.allowed or ())):
            if listed not in self.reports:
                logger.warning("no installed plugin is called %r; %s", listed, suggest(listed, self.reports))

    # Hooks ------------------------------------------------------------------------------------

    def has_hook(self, name: str) -> bool:
        """Whether any plugin implements the hook and is not muted."""
        return bool(self._listeners(name))

    def notify(self, name: str, **arguments: Any) -> None:
        """Call an observing hook of each plugin alone; one that fails three times is muted."""
        self._listeners(name).call(name, **arguments)

    def config_defaults(self, config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
        """Field -> (suggested value, plugin). Of several suggestions the first loaded plugin's wins.

        A plugin whose hook fails suggests nothing; with `strict` it is a PluginError.
        """
        suggested: dict[str, tuple[Any, str]] = {}
        for implementation in self._manager.hook.quire_config_defaults.get_hookimpls():
            name = implementation.plugin_name
            arguments = {"config": config}
            try:
                with Step(f"call quire_config_defaults of {name!r}"):
                    given: Any = implementation.function(*(arguments[argument] for argument in implementation.argnames))
                values = {} if given is None else dict(given)
            except Exception as error:
                self.complain(name, f"quire_config_defaults failed: {first_line(error)}")
                continue
            for field, value in values.items():
                suggested.setdefault(str(field), (value, name))
        return suggested

    def config_sections(self) -> dict[str, type[BaseModel]]:
        """Section of the configuration -> the model that reads it. Of two owners the first loaded wins."""
        found: dict[str, type[BaseModel]] = {}
        for implementation in self._manager.hook.quire_config_sections.get_hookimpls():
            name = implementation.plugin_name
            try:
                with Step(f"call quire_config_sections of {name!r}"):
                    answer: Any = implementation.function()
                given = dict(answer or {})
            except Exception as error:
                self.complain(name, f"quire_config_sections failed: {first_line(error)}")
                continue
            for section, model in given.items():
                if section in found:
                    self.complain(name, f"the configuration's section {section!r} belongs to another plugin")
                found.setdefault(section, model)
        return found

    def complain(self, plugin: str, problem: str) -> None:
        """Warn of a plugin that broke its contract after it was loaded; with `strict` raise PluginError."""
        message = f"{self.reports[plugin].label}: {problem}"
        if self._options.strict:
            raise PluginError(message, remedy=f"leave it out with -p no:{plugin}")
        logger.warning("%s; leave it out with -p no:%s", message, plugin)

    def _listeners(self, name: str) -> Observers:
        if name not in self._observers:
            labels = {report.name: report.label for report in self.reports.values()}
            self._observers[name] = Observers(getattr(self._manager.hook, name).get_hookimpls(), labels)
        return self._observers[name]


def build_host(options: HostOptions | None = None) -> PluginHost:
    """Load the core's providers, the installed plugins and the named files."""
    with Step(f"find entry points of group {GROUP!r}") as step:
        found = importlib.metadata.entry_points(group=GROUP)
        step.result = ", ".join(sorted(point.name for point in found)) or "none"
    return PluginHost(found, options or HostOptions())
