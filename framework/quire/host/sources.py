"""Where plugins come from: the core itself, installed entry points, and single files."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quire.errors import ConfigError
from quire.version import __version__

GROUP = "quire"
CORE = "core"
DISTRIBUTION = "quire"


class EntryPoint(Protocol):
    """What is used of `importlib.metadata.EntryPoint`; `dist` (name, version) is optional."""

    @property
    def name(self) -> str: ...
    def load(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class PluginSource:
    """A plugin that has not been imported yet; `load` imports it and returns the plugin object."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]


def core_source() -> PluginSource:
    """The core's own providers, which come through the same door as anybody's."""
    return PluginSource(CORE, DISTRIBUTION, __version__, lambda: importlib.import_module("quire.builtin"))


def installed_sources(found: Iterable[EntryPoint]) -> list[PluginSource]:
    """One source per entry point, ordered by name so that the order of installation does not matter."""
    return [_from_entry_point(point) for point in sorted(found, key=lambda point: point.name)]


def _from_entry_point(point: EntryPoint) -> PluginSource:
    dist = getattr(point, "dist", None)

    def load() -> object:
        try:
            return point.load()
        except (ModuleNotFoundError, AttributeError) as error:
            value = str(getattr(point, "value", ""))
            if not isinstance(error, ModuleNotFoundError) or not error.name or not value.startswith(error.name):
                raise
            mend = "correct it in pyproject.toml and install the plugin again"
            raise ModuleNotFoundError(f"{error}; its entry point says {value!r}: {mend}", name=error.name) from error

    return PluginSource(point.name, getattr(dist, "name", ""), getattr(dist, "version", ""), load)


def why_not_found(name: str) -> str:
    """Why nothing of this name may have been loaded: its entry point stands elsewhere, or it is not installed."""
    for point in importlib.metadata.entry_points(name=name):
        if point.group != GROUP and GROUP in point.group:
            owner = point.dist.name if point.dist is not None else "a distribution"
            return f"{owner} has it as an entry point of the group {point.group!r}; the group must be {GROUP!r}"
    return (
        f"a plugin is found once it is installed for {sys.executable}, with an entry point in the group {GROUP!r}; "
        "for your own, run `pip install -e .` in its folder, again after a change of pyproject.toml"
    )


def file_source(path: Path) -> PluginSource:
    """A plugin in one Python file; the file's stem is its name, and the module name that targets use.

    Raises:
        ConfigError: there is no such file, or its name cannot be a module's.
    """
    if not path.is_file():
        raise ConfigError(f"there is no plugin file {str(path)!r}", remedy="--plugin takes the path of a Python file")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(
            f"plugin file {path.name!r} cannot be imported", remedy="name it like a module, such as my_plugin.py"
        )
    return PluginSource(path.stem, str(path), "", lambda: _import_file(path.resolve()))


def _import_file(file: Path) -> object:
    """Import a file as a top-level module, so that `"stem:Class"` finds it; never shadows another module."""
    name = file.stem
    known = sys.modules.get(name)
    spec = getattr(known, "__spec__", None) if known is not None else importlib.util.find_spec(name)
    if known is not None or spec is not None:
        origin = getattr(spec, "origin", None) or getattr(known, "__file__", None)
        if origin is None or Path(origin).resolve() != file:
            raise ImportError(f"another module is called {name!r} (at {origin}); rename {file.name}")
        return importlib.import_module(name)
    return _execute(file, name)


def _execute(file: Path, name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
