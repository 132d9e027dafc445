"""Selection against a plain description of it, over random sets of providers."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.errors import ConfigError
from quire.hooks import hookimpl
from quire.plugin import MetricsSink, Provider
from quire.registry import HostOptions, PluginHost

PROBLEMS = ("none", "device", "probe", "target", "check")


class Sink(MetricsSink):
    def record_step(self, stats):
        pass


class Unwanted(Sink):
    pass


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    module = type(sys)("property_targets")
    module.Sink, module.Unwanted, module.refuse = Sink, Unwanted, lambda: "not here"
    monkeypatch.setitem(sys.modules, "property_targets", module)


@st.composite
def plugins(draw):
    """Plugin name -> providers, each with at most one problem."""
    found = {}
    for plugin in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        names = draw(st.lists(st.sampled_from("uvwxyz"), unique=True, max_size=4))
        found[plugin] = [(name, draw(st.integers(-2, 2)), draw(st.sampled_from(PROBLEMS))) for name in names]
    return found


def provider(name, priority, problem):
    target = {"target": "property_targets:Missing", "check": "property_targets:Unwanted"}.get(problem)
    return Provider(
        "metrics_sink",
        name,
        target or "property_targets:Sink",
        1,
        priority=priority,
        devices=frozenset({"tpu"}) if problem == "device" else frozenset(),
        probe="property_targets:refuse" if problem == "probe" else None,
    )


def entry(plugin_name, providers):
    class Plugin:
        @hookimpl
        def quire_providers(self):
            return providers

    class Entry:
        name = plugin_name

        def load(self):
            return Plugin()

    return Entry()


def check(target):
    return ["unwanted"] if target is Unwanted else []


@given(plugins(), st.sampled_from("uvwxyz"))
def test_select_takes_the_best_that_fits_and_names_strictly(offered, wanted):
    entries = [entry(name, [provider(*item) for item in items]) for name, items in offered.items()]
    host = PluginHost(entries, HostOptions())
    everything = [(-priority, True, name, plugin, problem) for plugin, items in offered.items()
                  for name, priority, problem in items] + [(0, False, "log", "core", "none")]  # fmt: skip
    ordered = sorted(everything)
    best = next(item for item in ordered if item[4] == "none")
    chosen = host.select("metrics_sink", device_type="cpu", check=check)
    assert (chosen.provider.name, chosen.plugin) == (best[2], best[3])
    better = ordered[: ordered.index(best)]
    assert [(item.provider.name, item.plugin) for item in chosen.rejected] == [(item[2], item[3]) for item in better]
    assert all(len(item.reasons) == 1 for item in chosen.rejected)
    table = host.explain("metrics_sink", device_type="cpu", check=check)
    assert [bool(item.reasons) for item in table] == [item[4] != "none" for item in ordered]
    assert [item.provider.name for item in table if item.chosen] == [chosen.provider.name]

    owners = [item for item in everything if item[2] == wanted]
    if len(owners) == 1 and owners[0][4] == "none":
        assert host.select("metrics_sink", wanted, device_type="cpu", check=check).plugin == owners[0][3]
    else:
        with pytest.raises(ConfigError):
            host.select("metrics_sink", wanted, device_type="cpu", check=check)
