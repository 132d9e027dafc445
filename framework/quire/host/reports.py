"""What the host remembers of each plugin and of each choice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from quire.contract.provider import Provider
from quire.errors import PluginError, QuireError


class PluginStatus(StrEnum):
    """How loading one plugin ended."""

    LOADED = "loaded"
    BLOCKED = "blocked"
    FAILED = "failed to import"
    REJECTED = "rejected"
    INCOMPATIBLE = "incompatible"


@dataclass(slots=True)
class PluginReport:
    """What became of one plugin.

    Attributes:
        name: of the entry point; plugins are blocked, allowed and qualified by it.
        distribution: that ships it; a file's path for a plugin in one file.
        version: of the distribution.
        status: how loading ended.
        reason: why it is not loaded; empty if it is.
        hooks: names of the hooks that it implements.
        providers: what it offers; empty unless it is loaded.
    """

    name: str
    distribution: str = ""
    version: str = ""
    status: PluginStatus = PluginStatus.LOADED
    reason: str = ""
    hooks: tuple[str, ...] = ()
    providers: tuple[Provider, ...] = ()

    @property
    def label(self) -> str:
        """Name, distribution and version, for messages."""
        shipped = f"{self.distribution} {self.version}".strip()
        return f"plugin {self.name!r} ({shipped})" if shipped else f"plugin {self.name!r}"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A provider that could not be chosen, and why."""

    provider: Provider
    plugin: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The provider chosen for a point.

    Attributes:
        provider: the choice.
        plugin: name of the plugin that offers it.
        target: what the provider's target names, imported.
        rejected: candidates of higher priority that could not be used.
        passed_over: (provider, plugin) names of candidates that were not needed.
    """

    provider: Provider
    plugin: str
    target: Any
    rejected: tuple[Rejection, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """`plugin:name`, which is unique."""
        return f"{self.plugin}:{self.provider.name}"

    def make(self, init: Any) -> Any:
        """An instance of the target. Raises PluginError that names it, or what was meant for the user."""
        try:
            return self.target(init)
        except (QuireError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is told as what did not fit
                raise
            raise PluginError(
                f"{self.provider.point} {self.provider.name!r} of plugin {self.plugin!r} could not be made: "
                f"{type(error).__name__}: {error}",
                remedy="`quire --debug ...` shows where",
            ) from error


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of `quire plugins explain`: a provider, and why it was or was not chosen.

    Attributes:
        provider: the provider.
        plugin: name of the plugin that offers it.
        chosen: whether it is the one to use.
        reasons: why it cannot be used; empty if it can.
        note: for one that could be used and is not: what stands before it.
    """

    provider: Provider
    plugin: str
    chosen: bool
    reasons: tuple[str, ...] = ()
    note: str = ""
