"""From global options and flags to a configuration and the loaded plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from quire.config import Configured, configure, core_sections, preset, with_defaults
from quire.config_sections import check_sections, read_section
from quire.registry import HostOptions, PluginHost, build_host


@dataclass(frozen=True, slots=True)
class Globals:
    """The options that stand before the subcommand.

    Attributes:
        blocked: names of plugins that are not loaded.
        files: plugins in single files.
        strict: a plugin that fails to load is an error.
        config: the configuration file.
        debug: show tracebacks.
    """

    blocked: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()
    strict: bool = False
    config: Path | None = None
    debug: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Globals:
        """From the root command's parsed parameters, which may not all be parsed yet."""
        config = params.get("config")
        return cls(
            blocked=frozenset(item.removeprefix("no:") for item in params.get("p") or ()),
            files=tuple(Path(item) for item in params.get("plugin") or ()),
            strict=bool(params.get("strict_plugins")),
            config=Path(config) if config is not None else None,
            debug=bool(params.get("debug")),
        )


@dataclass(frozen=True, slots=True)
class Session:
    """What most commands begin with."""

    configured: Configured
    host: PluginHost

    def section(self, name: str, **flags: Any) -> BaseModel:
        """A section that a plugin owns, as its model; `flags` that are not None win. Raises ConfigError."""
        given = {key: value for key, value in flags.items() if value is not None}
        values = {**self.configured.sections.get(name, {}), **given}
        return read_section(name, values, self.host.config_sections()[name])


def open_session(
    context: typer.Context, options: Mapping[str, Any], own_defaults: Mapping[str, Any] | None = None
) -> Session:
    """Merge flags, environment and file, load the plugins, add what they suggest.

    Args:
        context: of the command. options: its flags.
        own_defaults: fields that this command sets otherwise than the core if the user leaves them open.

    Raises:
        ConfigError: something is not allowed; says where it came from.
    """
    chosen: Globals = context.obj
    configured = configure(options, file=chosen.config, origin="flag")
    configured = preset(configured, own_defaults or {}, f"quire {context.info_name}")
    host = _host(chosen, configured)
    check_sections(configured.sections, host.config_sections(), core_sections())
    suggested = host.config_defaults(configured.config.model_dump())
    return Session(with_defaults(configured, suggested, host.complain), host)


def load_host(chosen: Globals) -> PluginHost:
    """Only the plugins, as configuration and global options say."""
    return _host(chosen, configure({}, file=chosen.config))


def _host(chosen: Globals, configured: Configured) -> PluginHost:
    config = configured.config
    return build_host(
        HostOptions(
            blocked=chosen.blocked | frozenset(config.blocked_plugins),
            allowed=None if config.allowed_plugins is None else frozenset(config.allowed_plugins),
            strict=chosen.strict,
            files=chosen.files,
        )
    )
