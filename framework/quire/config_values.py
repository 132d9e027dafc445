"""Values of configuration fields: read from text, and described for messages and documentation."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_NONE = frozenset({"null", "none"})


def parse_count(value: Any) -> Any:
    """`8k` -> 8000, `8Ki` -> 8192, `2GiB` -> 2147483648; anything that is not such a text passes through."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if match is None:
        return value
    exact = Fraction(match[1]) * _UNITS[match[2] or ""]
    return exact.numerator if exact.denominator == 1 else value


def parse_names(value: Any) -> Any:
    """`a, b` -> (a, b); anything that is not text passes through."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


Count = Annotated[int, BeforeValidator(parse_count)]
"""A number that may be written with a unit: k, M, G are powers of 1000; Ki, Mi, Gi of 1024."""

Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
"""A list of names, also written as one text with commas."""


def from_text(field: FieldInfo, text: str) -> Any:
    """A field's value as it stands in an environment variable or after a flag.

    Mappings and booleans are YAML (`{rms_norm: torch}`, `true`); `null` leaves an optional field empty;
    the rest is checked by the field's own type.
    """
    kinds = set(_leaves(field.annotation))
    if type(None) in kinds and text.strip().lower() in _NONE:
        return None
    if bool in kinds or dict in kinds:
        return parse_yaml(text)
    if tuple in kinds and text.strip().startswith("["):
        return parse_yaml(text)
    return text


def parse_yaml(text: str) -> Any:
    """The text as YAML, or the text itself if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def is_mapping(field: FieldInfo) -> bool:
    """Whether the field holds a mapping, whose keys may be given one by one."""
    return dict in set(_leaves(field.annotation))


def is_switch(field: FieldInfo) -> bool:
    """Whether the field is on or off."""
    return field.annotation is bool


def describe(field: FieldInfo) -> str:
    """What a field allows, such as `an integer from 1 to 4,096, or 'auto'`."""
    return _describe(field.annotation, field.metadata)


def _describe(kind: Any, metadata: Any) -> str:
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        flat = [item for note in notes for item in (note.metadata if isinstance(note, FieldInfo) else [note])]
        return _describe(inner, [*flat, *metadata])
    if get_origin(kind) in (Union, types.UnionType):
        return ", or ".join(_describe(part, metadata) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in get_args(kind))
    if kind is int:
        return _describe_int(metadata)
    if get_origin(kind) is tuple:
        return "a list of names"
    if get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
        return "a mapping"
    return {bool: "true or false", str: "text", type(None): "null"}.get(kind, str(kind))


def _describe_int(metadata: Any) -> str:
    low = next((item.ge for item in metadata if isinstance(item, annotated_types.Ge)), None)
    high = next((item.le for item in metadata if isinstance(item, annotated_types.Le)), None)
    if low is None or high is None:
        return "an integer"
    return f"an integer from {low:,} to {high:,}"


def _leaves(kind: Any) -> list[Any]:
    """The plain types that an annotation is made of; mappings are `dict`, tuples are `tuple`."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _leaves(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(kind) for leaf in _leaves(part)]
    if origin is tuple:
        return [tuple]
    if origin is Literal:
        return [str]
    if origin is not None and issubclass(origin, Mapping):
        return [dict]
    return [kind]
