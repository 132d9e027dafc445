"""Plugins from an installed distribution, and from a single file."""

from __future__ import annotations

import importlib
import sys

import pytest
from quire.errors import ConfigError
from quire.registry import HostOptions, PluginHost, PluginStatus, build_host

PLUGIN = """
from quire.plugin import MetricsSink, Provider, hookimpl


class Sink(MetricsSink):
    def record_step(self, stats):
        pass


@hookimpl
def quire_providers(host):
    return [Provider("metrics_sink", "{name}", f"{{__name__}}:Sink", api=1, summary="a sink")]
"""


@pytest.fixture
def clean_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def installed(tmp_path, monkeypatch, clean_modules):
    """A folder on sys.path that looks like site-packages with one distribution in it."""
    info = tmp_path / "acme_sink-4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-sink\nVersion: 4.5\n")
    (info / "entry_points.txt").write_text("[quire]\nacme = acme_sink\nbroken = acme_sink.missing\n")
    (tmp_path / "acme_sink.py").write_text(PLUGIN.format(name="acme"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_installed_distribution_is_found(installed):
    host = build_host()
    report = host.reports["acme"]
    assert (report.distribution, report.version, report.status) == ("acme-sink", "4.5", PluginStatus.LOADED)
    assert host.select("metrics_sink", "acme").target.__module__ == "acme_sink"
    assert host.reports["broken"].status == PluginStatus.FAILED
    assert "acme_sink" in host.reports["broken"].reason


def test_a_plugin_in_one_file(tmp_path, clean_modules):
    file = tmp_path / "my_own_sink.py"
    file.write_text(PLUGIN.format(name="own"))
    for _ in range(2):  # a second host in the same process meets the imported module
        host = PluginHost([], HostOptions(files=(file,)))
        assert host.reports["my_own_sink"].status == PluginStatus.LOADED, host.reports["my_own_sink"].reason
        assert host.select("metrics_sink", "my_own_sink:own").target.__name__ == "Sink"
    assert host.reports["my_own_sink"].distribution == str(file)


def test_a_file_that_fails_is_taken_back(tmp_path, clean_modules):
    file = tmp_path / "half_a_plugin.py"
    file.write_text("x = 1\nraise RuntimeError('half way')\n")
    host = PluginHost([], HostOptions(files=(file,)))
    assert host.reports["half_a_plugin"].status == PluginStatus.FAILED
    assert "half way" in host.reports["half_a_plugin"].reason
    assert "half_a_plugin" not in sys.modules


def test_a_file_never_shadows_another_module(tmp_path, clean_modules):
    file = tmp_path / "json.py"
    file.write_text(PLUGIN.format(name="json"))
    host = PluginHost([], HostOptions(files=(file,)))
    assert host.reports["json"].status == PluginStatus.FAILED
    assert "rename json.py" in host.reports["json"].reason


@pytest.mark.parametrize("name", ["nowhere.py", "not-a-module.py", "plugin.txt"])
def test_a_file_that_cannot_be_a_plugin_is_an_error(tmp_path, name):
    if name != "nowhere.py":
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError) as caught:
        PluginHost([], HostOptions(files=(tmp_path / name,)))
    assert caught.value.remedy


def test_a_blocked_file_is_not_run(tmp_path, clean_modules):
    file = tmp_path / "never_run.py"
    file.write_text("raise RuntimeError\n")
    host = PluginHost([], HostOptions(files=(file,), blocked=frozenset({"never_run"})))
    assert host.reports["never_run"].status == PluginStatus.BLOCKED
