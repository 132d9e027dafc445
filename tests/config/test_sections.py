"""Sections of the configuration that plugins own."""

import sys

import pytest
import typer
from pydantic import BaseModel, ConfigDict
from quire.cli.session import Globals, open_session
from quire.config import configure, core_sections
from quire.config_sections import check_sections, merge
from quire.errors import ConfigError

PLUGIN = """
from pydantic import BaseModel, ConfigDict
from quire.plugin import hookimpl

class Queue(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 4

class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    port: int = 8000
    queue: Queue = Queue()

@hookimpl
def quire_config_sections():
    return {"kiosk": Settings}
"""


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    port: int = 1
    inner: Inner = Inner()


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "kiosk_plugin.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop("kiosk_plugin", None)


@pytest.fixture
def session(tmp_path, monkeypatch, plugin_file):
    """Opens a session with the plugin, a file and variables."""

    def open_it(text="{}", plugin=True, **variables):
        (tmp_path / "c.yaml").write_text(text)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        files = (plugin_file,) if plugin else ()
        context = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)))
        context.obj = Globals(files=files, config=tmp_path / "c.yaml")
        return open_session(context, {})

    return open_it


def test_flags_win_over_variables_over_the_file_over_defaults(session):
    settings = session("kiosk: {port: 1, queue: {size: 2}}").section("kiosk")
    assert (settings.port, settings.queue.size) == (1, 2)
    opened = session("kiosk: {port: 1}", QUIRE_KIOSK__QUEUE__SIZE="3")
    assert (opened.section("kiosk").port, opened.section("kiosk").queue.size) == (1, 3)
    opened = session("kiosk: {port: 1}", QUIRE_KIOSK__PORT="2")
    assert opened.section("kiosk").port == 2
    assert opened.section("kiosk", port=5).port == 5
    assert opened.section("kiosk", port=None).port == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kiosk: {prot: 1}", "unknown key 'kiosk.prot'.*did you mean 'port'"),
        ("kiosk: {queue: {sise: 1}}", "unknown key 'kiosk.queue.sise'.*did you mean 'size'"),
        ("kiosk: {port: many}", "kiosk.port is 'many'"),
        ("kioks: {port: 1}", "no loaded plugin owns.*did you mean 'kiosk'"),
        ("engin: {seed: 3}", "'engin'.*did you mean 'engine'"),
    ],
)
def test_mistakes_are_named(session, text, words):
    with pytest.raises(ConfigError, match=words):
        session(text)


def test_a_section_whose_plugin_is_not_loaded_is_an_error(session):
    with pytest.raises(ConfigError, match="kiosk"):
        session("kiosk: {port: 1}", plugin=False)


def test_variables_of_unknown_sections_are_errors():
    sections = configure({}, environment={"QUIRE_ENGIN__SEED": "3"}).sections
    with pytest.raises(ConfigError, match="engin"):
        check_sections(sections, {}, core_sections())


def test_merging():
    assert merge({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}, "e": 5}) == {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    check_sections({"outer": {"port": 2, "inner": {"size": 3}}}, {"outer": Outer}, frozenset())
