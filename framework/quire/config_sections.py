"""Sections of the configuration that plugins own, such as `server`.

A section is known by its name alone until the plugins are loaded; then the pydantic model that the
plugin gave for it reads it. Sources as for the core's fields: environment over file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from quire.config_values import parse_yaml
from quire.errors import ConfigError
from quire.host.suggest import suggest

Sections = Mapping[str, Mapping[str, Any]]
"""Name of a section -> what was said in it, not validated."""
Model = TypeVar("Model", bound=BaseModel)


def foreign_sections(tree: Mapping[str, Any], core: frozenset[str]) -> dict[str, Mapping[str, Any]]:
    """The sections of a file that are not the core's."""
    return {str(key): value for key, value in tree.items() if key not in core and isinstance(value, Mapping)}


def foreign_variables(environment: Mapping[str, str], prefix: str, core: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Variables such as QUIRE_SERVER__PORT as nested values: {server: {port: ...}}."""
    found: dict[str, dict[str, Any]] = {}
    for variable in sorted(environment):
        if not is_foreign(variable, prefix, core):
            continue
        section, *parents, last = variable.removeprefix(prefix).lower().split("__")
        node = found.setdefault(section, {})
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = parse_yaml(environment[variable])
    return found


def is_foreign(variable: str, prefix: str, core: frozenset[str]) -> bool:
    """Whether a variable sets something in a section that is not the core's."""
    section, separator, key = variable.removeprefix(prefix).lower().partition("__")
    return variable.startswith(prefix) and bool(separator and key) and section not in core


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `high` winning where both name a value."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def check_sections(sections: Sections, known: Mapping[str, type[BaseModel]], core: frozenset[str]) -> None:
    """Raises ConfigError for a section that nobody owns, or that its owner's model refuses."""
    for name in sections:
        if name not in known:
            raise ConfigError(
                f"the configuration has a section {name!r} that no loaded plugin owns",
                remedy=suggest(name, [*core, *known]),
            )
        read_section(name, sections[name], known[name])


def read_section(name: str, values: Mapping[str, Any], model: type[Model]) -> Model:
    """Validate a section. Raises ConfigError naming the key, its value and what is wrong with it."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join([name, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            parent = model
            for part in first["loc"][:-1]:
                inner = parent.model_fields[str(part)].annotation
                parent = inner if isinstance(inner, type) else parent
            remedy = suggest(str(first["loc"][-1]), parent.model_fields)
            raise ConfigError(f"unknown key {path!r} in the configuration", remedy=remedy) from None
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path} is {first['input']!r}: {reason[:1].lower()}{reason[1:]}") from None
