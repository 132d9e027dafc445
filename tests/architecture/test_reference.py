"""Every hook, configuration field and extension point is documented, with its signature and bounds."""

from __future__ import annotations

import inspect
import re

import pytest
from public_api import describe
from quire.config import SPECIAL_VARIABLES, EngineConfig, environment_variable, field_path
from quire.config_values import describe as allowed
from quire.contract.provider import POINTS
from quire.hooks import HOOK_NAMES, HookSpecs
from quire.host.objects import import_object
from quire.testing.certify import KITS
from reference import FOLDER, pages, stale


@pytest.fixture(scope="module")
def page():
    return lambda name: (FOLDER / "reference" / name).read_text(encoding="utf-8")


def headings(text):
    return set(re.findall(r"^## (\S+)$", text, re.MULTILINE))


def test_the_pages_say_what_the_code_says():
    assert stale() == [], "run python scripts/reference.py"


def test_a_stale_page_is_noticed(tmp_path):
    for name, text in pages().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert stale(tmp_path) == []
    (tmp_path / "reference/hooks.md").write_text("old")
    (tmp_path / "plugins/reference/sampler.md").unlink()
    assert set(stale(tmp_path)) == {"reference/hooks.md", "plugins/reference/sampler.md"}


@pytest.mark.parametrize("name", sorted(HOOK_NAMES))
def test_every_hook_is_documented(page, name):
    assert name in headings(page("hooks.md"))
    assert f"def {name}(" in page("hooks.md")
    assert getattr(HookSpecs, name).__doc__ in page("hooks.md")


@pytest.mark.parametrize("name", EngineConfig.model_fields)
def test_every_field_is_documented(page, name):
    field = EngineConfig.model_fields[name]
    text = page("config.md")
    assert name in headings(text)
    assert field.description is not None
    assert field.description.endswith(".")
    for part in (field.description, f"`{field_path(name)}`", f"`{environment_variable(name)}`", allowed(field)):
        assert part in text


def test_every_special_variable_and_point_is_documented(page):
    assert all(f"`{name}`" in page("config.md") for name in SPECIAL_VARIABLES)
    assert all(f"| [`{name}`](../plugins/reference/{name}.md) |" in page("points.md") for name in POINTS)


@pytest.mark.parametrize("point", POINTS.values(), ids=lambda point: point.name)
def test_every_point_has_a_page_with_its_signatures_and_checks(page, point):
    text, base = page(f"../plugins/reference/{point.name}.md"), import_object(point.base)
    for line in describe(base.__name__, base):
        assert line in text
    for name, member in vars(base).items():
        if callable(member) and not name.startswith("_") and member.__doc__ and not inspect.isclass(member):
            assert inspect.cleandoc(member.__doc__) in text
    kit = import_object(KITS[point.name].target)
    assert all(f"`{name}`" in text for name in dir(kit) if name.startswith("test_"))
    assert re.search(r"^## \w+Init$", text, re.MULTILINE)
