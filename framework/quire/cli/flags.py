"""Flags that are derived from the fields of `EngineConfig`; nobody lists them by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import typer

from quire.config import EngineConfig
from quire.config_values import describe, from_text, is_mapping, is_switch, parse_yaml
from quire.errors import ConfigError

PANEL = "Engine"


def flag_of(name: str) -> str:
    """The flag of a field, such as `--max-model-len`."""
    return "--" + name.replace("_", "-")


def engine_flags(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of `EngineConfig`, except those named.

    The command receives what was given as its argument `options`, flat values for `configure`.
    """
    names = [name for name in EngineConfig.model_fields if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in names}
            command(**arguments, options=values_of(given))

        own = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in own.parameters.values() if parameter.name != "options"]
        parameters = [*kept, *(_parameter(name) for name in names)]
        wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapped.__wrapped__
        return wrapped

    return decorate


def values_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values of the flags that were given. Raises ConfigError for a key without a value."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = EngineConfig.model_fields[name]
        if value is None or value == []:
            continue
        if is_mapping(field):
            values[name] = _mapping(name, value)
        else:
            values[name] = value if is_switch(field) else from_text(field, value)
    return values


def _parameter(name: str) -> inspect.Parameter:
    field = EngineConfig.model_fields[name]
    help_text = (field.description or "").replace("[", "\\[")
    annotation: Any
    if is_switch(field):
        annotation, flags, metavar = bool | None, f"{flag_of(name)}/--no-{name.replace('_', '-')}", None
    elif is_mapping(field):
        annotation, flags = list[str] | None, flag_of(name)
        metavar = "NAME.OPTION=VALUE" if name == "plugin_options" else "KEY=VALUE"
    else:
        annotation, flags, metavar = str | None, flag_of(name), _metavar(describe(field))
    option = typer.Option(None, flags, metavar=metavar, help=help_text, rich_help_panel=PANEL, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _metavar(description: str) -> str:
    words = [("true or false", "TRUE|FALSE"), ("integer", "N"), ("list", "A,B"), ("text", "TEXT")]
    found = next((short for word, short in words if word in description), None)
    if found is None:  # a choice of words
        return description.replace("'", "").replace(" or ", "|").upper()
    return f"{found}|AUTO" if "'auto'" in description else found


def _mapping(name: str, items: list[str]) -> dict[str, Any]:
    """`["a=1"]` -> {a: 1}; for plugins' options `["radix.size=1"]` -> {radix: {size: 1}}."""
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        owner, _, option = key.rpartition(".")
        nested = name == "plugin_options"
        if not equals or not key or (nested and not (owner and option)):
            form = "NAME.OPTION=VALUE" if nested else "KEY=VALUE"
            raise ConfigError(f"{flag_of(name)} {item!r} is not understood", remedy=f"write {form}")
        if nested:
            found.setdefault(owner, {})[option] = parse_yaml(text)
        else:
            found[key] = text
    return found
