"""The reference page of each extension point, from its classes' signatures and docstrings and its kit's checks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import quire.plugin
from public_api import describe, function_of
from quire.contract.provider import POINTS, Point
from quire.host.objects import import_object
from quire.testing.certify import KITS, contract_and_advice

CONTRACT = "quire.contract."


def point_page(point: Point) -> str:
    """One point: what is implemented, every class that it meets, and what the kit checks."""
    base = import_object(point.base)
    served = f"{point.current}" if point.oldest == point.current else f"{point.oldest} to {point.current}"
    parts = [
        f"# {point.name}: {point.summary}\n\n"
        f"A provider's target {_form(base)} `{point.base.replace(':', '.')}`. API version {served}, {point.tier}. "
        "Everything named here is imported from `quire.plugin`.\n"
    ]
    parts += [_class(name, getattr(quire.plugin, name)) for name in classes_of(point)]
    return "\n".join([*parts, _checks(point)])


def classes_of(point: Point) -> list[str]:
    """The point's base class, what its signatures and fields mention, and what else its module offers.

    Other points' own classes are left out; of a module that two points share, what this one does not mention.
    """
    modules = [import_object(other.base).__module__ for other in POINTS.values()]
    own = import_object(point.base).__module__
    found, queue = list[str](), [point.base.rpartition(":")[2]]
    if modules.count(own) == 1:
        queue += [
            name for name in quire.plugin.__all__ if getattr(getattr(quire.plugin, name), "__module__", "") == own
        ]
    while queue:
        name = queue.pop(0)
        value = getattr(quire.plugin, name)
        module = getattr(value, "__module__", "")
        if name in found or not inspect.isclass(value) or not module.startswith(CONTRACT):
            continue
        if module in modules and module != own:
            continue
        found.append(name)
        queue += [word for word in re.findall(r"\w+", "\n".join(describe(name, value))) if word in quire.plugin.__all__]
    return found


def _form(base: type) -> str:
    return "is a subclass of" if inspect.isabstract(base) else "is an instance of"


def _class(name: str, value: type) -> str:
    lines = [f"## {name}\n\n```python\n" + "\n".join(describe(name, value)) + "\n```\n"]
    text = vars(value).get("__doc__") or f"{name}("
    if not text.startswith(f"{name}("):  # what a dataclass without a docstring says of itself
        lines.append(f"```text\n{inspect.cleandoc(text)}\n```\n")
    lines += [f"`{method}`\n\n```text\n{text}\n```\n" for method, text in _documented(value)]
    return "\n".join(lines)


def _documented(value: type) -> Iterator[tuple[str, str]]:
    """The class's own public methods, and its constructor, that say something."""
    for name, member in vars(value).items():
        function = function_of(member)
        is_public = not name.startswith("_") or name == "__init__"
        if is_public and inspect.isfunction(function) and function.__doc__:
            yield name, inspect.cleandoc(function.__doc__)


def _checks(point: Point) -> str:
    kit = KITS[point.name]
    cls: Any = import_object(kit.target)
    lines = [f"## What the kit checks\n\n`{kit.target.replace(':', '.')}`, run by `quire plugins test`.\n"]
    for name in checks_of(cls):
        contract, advice = contract_and_advice(getattr(cls, name))
        lines.append(f"* `{name}`: {contract} If it fails: {advice}")
    return "\n".join(lines) + "\n"


def checks_of(kit: type) -> list[str]:
    """The kit's checks in the order in which they run."""
    every = [name for cls in reversed(kit.__mro__) for name in vars(cls) if name.startswith("test_")]
    return list(dict.fromkeys(every))


def point_pages() -> dict[str, str]:
    """File name below docs -> content."""
    return {f"plugins/reference/{point.name}.md": point_page(point) for point in POINTS.values()}
