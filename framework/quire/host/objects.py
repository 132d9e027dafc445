"""Names of Python objects as `"package.module:attribute"`: checked as text, imported when needed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from quire.contract.provider import Point
from quire.host.suggest import suggest


def is_path(text: object) -> bool:
    """Whether the text has the form `package.module:attribute`."""
    if not isinstance(text, str) or text.count(":") != 1:
        return False
    module, attribute = text.split(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def import_object(path: str) -> Any:
    """The object that `"package.module:attribute"` names.

    Raises whatever the import raises; AttributeError says what the module has instead.
    """
    module, attribute = path.split(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise AttributeError(f"{path.split(':')[0]} has no {part!r}; {suggest(part, names)}")
        found = getattr(found, part)
    return found


def why_not_imported(path: str, error: BaseException) -> str:
    """What kept a path from being imported, with the mend."""
    reason = f"{path!r} cannot be imported: {first_line(error)}"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None:
        return reason
    if path.startswith((f"{missing.partition('.')[0]}.", f"{missing}:")):
        return f"{reason}; correct the path, or install the plugin again"
    return f"{reason}; install it, and add it to the plugin's dependencies"


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
        names = sorted(vars(obj)["__abstractmethods__"])
        return [f"its target lacks {', '.join(f'the method {name}{_signature(base, name)}' for name in names)}"]
    return [*_lacking(base, obj), *_unlike(base, obj)]


def _lacking(base: type, cls: type) -> list[str]:
    """The base's class attributes that have no default, and no value in the class."""
    declared = [name for name, kind in inspect.get_annotations(base).items() if str(kind).startswith("ClassVar")]
    return [f"its target lacks the class attribute {name!r}" for name in declared if not hasattr(cls, name)]


def _unlike(base: type, cls: type) -> list[str]:
    """Methods that cannot be called as the base's are."""
    reasons = []
    for name, method in vars(base).items():
        function, own = getattr(base, name), getattr(cls, name)
        if (name.startswith("_") and name != "__init__") or not inspect.isfunction(method) or own is function:
            continue
        try:
            inspect.signature(own).bind(*inspect.signature(function).parameters)
        except TypeError as error:
            wanted, found = _signature(base, name), _signature(cls, name)
            reasons.append(f"its target's {name}{found} must take {wanted}: {error}")
        except ValueError:  # no signature: compiled code
            continue
    return reasons


def _signature(cls: type, name: str) -> str:
    """A method's parameters by their names."""
    return f"({', '.join(inspect.signature(getattr(cls, name)).parameters)})"


def first_line(error: BaseException) -> str:
    """`Type: first line of the message`, for a table cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
