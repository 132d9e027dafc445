"""The hooks that a plugin may implement. All return data or receive a facade; none runs per token.

A plugin is a module (or object) whose functions carry `@hookimpl`; arguments are opt-in by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer
    from pydantic import BaseModel

    from quire.contract.metrics import StepStats
    from quire.contract.provider import Provider
    from quire.facade import EngineFacade, HostInfo

PROJECT = "quire"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Specifications; each docstring is the hook's contract."""

    @hookspec
    def quire_providers(self, host: HostInfo) -> Iterable[Provider]:  # type: ignore[empty-body]
        """Return the providers that this plugin offers."""

    @hookspec
    def quire_cli(self, app: typer.Typer) -> None:
        """Add subcommands to the `quire` program; one named `bench X` stands beside `bench`."""

    @hookspec
    def quire_config_sections(self) -> Mapping[str, type[BaseModel]]:  # type: ignore[empty-body]
        """Return the sections of the configuration that this plugin owns: name -> pydantic model."""

    @hookspec
    def quire_config_defaults(self, config: Mapping[str, Any]) -> Mapping[str, Any]:  # type: ignore[empty-body]
        """Suggest values for config fields that the user left open; the user's values win."""

    @hookspec
    def quire_on_engine_start(self, engine: EngineFacade) -> None:
        """An engine is ready to serve."""

    @hookspec
    def quire_on_step(self, stats: StepStats) -> None:
        """A step has ended. Called in the engine's thread: return at once."""


HOOK_ARGUMENTS = {
    name: tuple(inspect.signature(hook).parameters)[1:]
    for name, hook in vars(HookSpecs).items()
    if name.startswith("quire_")
}
"""Hook -> names of the arguments that it may take."""
HOOK_NAMES = frozenset(HOOK_ARGUMENTS)
