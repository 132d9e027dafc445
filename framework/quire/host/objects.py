"""Names of Python objects as `"package.module:attribute"`: checked as text, imported when needed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from quire.contract.provider import Point


def is_path(text: object) -> bool:
    """Whether the text has the form `package.module:attribute`."""
    if not isinstance(text, str) or text.count(":") != 1:
        return False
    module, attribute = text.split(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def import_object(path: str) -> Any:
    """The object that `"package.module:attribute"` names. Raises whatever the import raises."""
    module, attribute = path.split(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def why_not_a(point: Point, obj: Any) -> list[str]:
    """Reasons why an object does not implement the point's base; empty if it does.

    A point with an abstract base wants a subclass without abstract methods, any other an instance.
    """
    base = import_object(point.base)
    if not inspect.isabstract(base):
        return [] if isinstance(obj, base) else [f"its target is not an instance of {base.__name__}"]
    if not isinstance(obj, type) or not issubclass(obj, base):
        return [f"its target is not a subclass of {base.__name__}"]
    if inspect.isabstract(obj):
        return [f"its target lacks {', '.join(sorted(vars(obj)['__abstractmethods__']))}"]
    return []


def first_line(error: BaseException) -> str:
    """`Type: first line of the message`, for a table cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
