"""Every hook, configuration field and extension point is documented, with its signature and bounds."""

from __future__ import annotations

import re

import pytest
from quire.config import SPECIAL_VARIABLES, EngineConfig, environment_variable, field_path
from quire.config_values import describe
from quire.contract.provider import POINTS
from quire.hooks import HOOK_NAMES, HookSpecs
from reference import FOLDER, pages, stale


@pytest.fixture(scope="module")
def page():
    return lambda name: (FOLDER / name).read_text(encoding="utf-8")


def headings(text):
    return set(re.findall(r"^## (\S+)$", text, re.MULTILINE))


def test_the_pages_say_what_the_code_says():
    assert stale() == [], "run python scripts/reference.py"


def test_a_stale_page_is_noticed(tmp_path):
    for name, text in pages().items():
        (tmp_path / name).write_text(text)
    assert stale(tmp_path) == []
    (tmp_path / "hooks.md").write_text("old")
    (tmp_path / "config.md").unlink()
    assert set(stale(tmp_path)) == {"hooks.md", "config.md"}


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
    for part in (field.description, f"`{field_path(name)}`", f"`{environment_variable(name)}`", describe(field)):
        assert part in text


def test_every_special_variable_and_point_is_documented(page):
    assert all(f"`{name}`" in page("config.md") for name in SPECIAL_VARIABLES)
    assert all(f"| `{name}` |" in page("points.md") for name in POINTS)
