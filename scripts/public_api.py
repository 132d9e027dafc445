"""Writes down every public name of `quire` and `quire.plugin` with its signature and fields.

    python scripts/public_api.py            print it
    python scripts/public_api.py --update   write tests/architecture/public_api.txt

A change there is a change for users or plugin authors: raise the point's API version if it breaks one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SNAPSHOT = Path(__file__).resolve().parents[1] / "tests" / "architecture" / "public_api.txt"
MODULES = ("quire", "quire.plugin", "quire.commands")


def describe_all() -> str:
    """The whole text."""
    lines: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"# {module_name}")
        for name in sorted(module.__all__):
            lines += ["", *describe(name, getattr(module, name))]
        lines.append("")
    return "\n".join(lines)


def describe(name: str, value: Any) -> Iterator[str]:
    """One public name."""
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        yield f"class {name}({', '.join(bases)})"
        yield from (f"    {line}" for line in _class(value))
    elif inspect.isfunction(value):
        yield f"def {name}{_signature(value)}"
    elif name == "POINTS":
        yield name
        for point in value.values():
            yield f"    {point.name}: API {point.oldest} to {point.current}, {point.tier}, base {point.base}"
    else:
        yield f"{name}: {type(value).__name__} = {_stable(value)}"


def _class(cls: type) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        for member in cls:
            yield f"{member.name} = {member.value!r}"
        return
    fields: set[str] = set()
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            fields.add(field.name)
            yield f"{field.name}: {field.type}{_default(field)}"
    elif issubclass(cls, BaseModel):
        annotations = inspect.get_annotations(cls)
        for name, info in cls.model_fields.items():
            fields.add(name)
            yield f"{name}: {annotations[name]} = {info.default!r}"
    else:
        for name, annotation in inspect.get_annotations(cls).items():
            if not name.startswith("_"):
                fields.add(name)
                yield f"{name}: {annotation}"
    yield from _methods(cls, fields)


def _methods(cls: type, fields: set[str]) -> Iterator[str]:
    own_init = "__init__" in vars(cls) and not dataclasses.is_dataclass(cls) and not issubclass(cls, BaseModel)
    names = [name for name in vars(cls) if not name.startswith(("_", "model_")) and name not in fields]
    for name in (["__init__"] if own_init else []) + sorted(names):
        member = inspect.getattr_static(cls, name)
        function = function_of(member)
        mark = "abstract " if getattr(function, "__isabstractmethod__", False) else ""
        if isinstance(member, property):
            yield f"{mark}property {name}{_signature(member.fget)}"
        elif inspect.isfunction(function):
            kind = type(member).__name__ + " " if isinstance(member, (classmethod, staticmethod)) else ""
            kind += "async " if inspect.iscoroutinefunction(function) else ""
            yield f"{mark}{kind}def {name}{_signature(function)}"


def function_of(member: Any) -> Any:
    """What a class or static method wraps, or the member itself."""
    return getattr(member, "__func__", member)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_stable(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory.__name__}()"
    return ""


def _signature(function: Any) -> str:
    """As Python shows it, but with annotations as they are written, and defaults without addresses."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [
        parameter.replace(
            annotation=empty if parameter.annotation is empty else _Text(str(parameter.annotation)),
            default=empty if parameter.default is empty else _Text(_stable(parameter.default)),
        )
        for parameter in signature.parameters.values()
    ]
    returns = signature.return_annotation
    return str(
        signature.replace(parameters=parameters, return_annotation=returns if returns is empty else _Text(str(returns)))
    )


BREAKING = """A line that is gone or changed, a new field without a default and a new abstract method break plugins that
are out there: raise `current` of the extension point in framework/quire/contract/provider.py and give it an adapter
for the version before (docs/plugins/compatibility.md). A field with a default or an optional method only adds."""
MEND = "If it is meant: say it in CHANGELOG.md, then run `python scripts/public_api.py --update`."


def difference(written: str, now: str) -> str:
    """What changed, name by name, for people to read; empty if nothing did."""
    before, after = _by_name(written), _by_name(now)
    parts = []
    for name in sorted({*before, *after}):
        old, new = before.get(name, []), after.get(name, [])
        if old != new:
            lines = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
            state = "is new" if not old else "is gone" if not new else "changed"
            parts.append("\n".join([f"{name} {state}:", *(f"  {line}" for line in lines)]))
    if not parts:
        return ""
    breaks = any(_breaks(line.strip()) for part in parts for line in part.splitlines()[1:])
    return "\n\n".join(["The public API is not as written down.", *parts, *([BREAKING] if breaks else []), MEND])


def _by_name(text: str) -> dict[str, list[str]]:
    """`module: name` -> its lines, the heading first."""
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("# "):
            module = lines[0].removeprefix("# ")
        elif lines:
            found[f"{module}: {re.split(r'[(:]', lines[0].removeprefix('class ').removeprefix('def '))[0]}"] = lines
    return found


def _breaks(line: str) -> bool:
    """Whether a line of the difference takes something away, or demands something new."""
    if line.startswith("- "):
        return True
    added = line.removeprefix("+ ").strip()
    is_field = re.match(r"\w+: ", added) is not None
    return added.startswith("abstract ") or (is_field and " = " not in added)


class _Text:
    """Shows as the text that it was given."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _stable(value: Any) -> str:
    """As `repr`, without addresses and with sets in order."""
    if isinstance(value, (frozenset, set)):
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    return "..." if " at 0x" in repr(value) else repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the snapshot")
    if parser.parse_args().update:
        SNAPSHOT.write_text(describe_all(), encoding="utf-8")
        print(f"wrote {SNAPSHOT}")
    else:
        print(describe_all())


if __name__ == "__main__":
    main()
