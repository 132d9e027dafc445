"""A plugin's own options, as they stand under its provider's name in the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from quire.contract.provider import Provider
from quire.errors import ConfigError, PluginError
from quire.host.objects import import_object, why_not_imported
from quire.host.suggest import suggest

Owned = tuple[Provider, str]
"""A provider and the name of its plugin."""


def keys_of(provider: Provider, plugin: str) -> tuple[str, str, str]:
    """The names under which a provider's options may stand: bare, by its point, by its plugin."""
    return provider.name, f"{provider.point}.{provider.name}", f"{plugin}:{provider.name}"


def owner_of(key: str, owned: Iterable[Owned]) -> Owned:
    """The provider that options under `key` are for.

    A bare name that several points share means the only one of them that takes options.
    Raises ConfigError for an unknown or ambiguous key.
    """
    everything = list(owned)
    found = [pair for pair in everything if key in keys_of(*pair)]
    if not found:
        known = {name for pair in everything for name in keys_of(*pair)[:1]}
        raise ConfigError(f"plugin_options names {key!r}, which no loaded plugin provides", remedy=suggest(key, known))
    taking = [pair for pair in found if pair[0].options is not None]
    if not taking:
        provider = found[0][0]
        raise ConfigError(f"{provider.point} {provider.name!r} takes no options", remedy=f"remove {key!r}")
    if len(taking) > 1:
        full = sorted({keys_of(*pair)[1] for pair in taking})
        full = full if len(full) > 1 else sorted(keys_of(*pair)[2] for pair in taking)
        raise ConfigError(f"plugin_options.{key} could mean several providers", remedy=f"write one of {full}")
    return taking[0]


def options_model(provider: Provider, plugin: str) -> type[BaseModel]:
    """The provider's options model. Raises PluginError if it is not a pydantic model that forbids extra fields."""
    assert provider.options is not None
    try:
        model = import_object(provider.options)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the options of {plugin}:{provider.name}: {why_not_imported(provider.options, error)}",
            remedy=f"mend plugin {plugin!r}",
        ) from error
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or model.model_config.get("extra") != "forbid":
        raise PluginError(
            f"{provider.options} of plugin {plugin!r} must be a pydantic model with extra='forbid'",
            remedy='derive it from BaseModel, with `model_config = ConfigDict(frozen=True, extra="forbid")`',
        )
    return model


def validated(provider: Provider, plugin: str, given: Mapping[str, Any]) -> BaseModel:
    """The provider's options. Raises ConfigError naming the option, its value and what is allowed."""
    model = options_model(provider, plugin)
    label = f"{provider.point} {provider.name!r}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"the options of {label} are {given!r}; a mapping is needed")
    for key in given:
        if key not in model.model_fields:
            raise ConfigError(f"{label} has no option {key!r}", remedy=suggest(str(key), model.model_fields))
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] == "missing" else f" is {first['input']!r}"
        raise ConfigError(f"option {key!r} of {label}{value}: {first['msg'].removeprefix('Value error, ')}") from None
