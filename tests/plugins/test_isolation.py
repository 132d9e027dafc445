"""Each plugin is loaded alone: one that goes wrong leaves no trace, and the others go on."""

from __future__ import annotations

import logging
import sys
import types

import pytest
from quire.errors import ConfigError, PluginError
from quire.hooks import hookimpl
from quire.plugin import Provider
from quire.registry import HostOptions, PluginHost, PluginStatus


class Dist:
    def __init__(self, name, version):
        self.name, self.version = name, version


class FakeEntryPoint:
    """An entry point that returns a plugin, or runs what stands in its place."""

    def __init__(self, name, plugin=None, run=None):
        self.name, self.dist = name, Dist(f"dist-{name}", "1.2.3")
        self._plugin, self._run = plugin, run

    def load(self):
        return self._run() if self._run is not None else self._plugin


def sink(name, target="quire.engine.metrics:LogSink", **fields):
    return Provider("metrics_sink", name, target, **({"api": 1} | fields))


def plugin(*providers):
    """A plugin object that offers these providers."""

    class Plugin:
        @hookimpl
        def quire_providers(self):
            return providers

    return Plugin()


def host_of(*entry_points, **options):
    return PluginHost(entry_points, HostOptions(**options))


def raiser(error):
    def run():
        raise error

    return run


class Misspelt:
    @hookimpl
    def quire_provider(self):
        return []


class Unmarked:
    def quire_providers(self):
        return []


class WrongArgument:
    @hookimpl
    def quire_providers(self, hots):
        return []


class Raises:
    @hookimpl
    def quire_providers(self):
        yield sink("half")
        raise ZeroDivisionError("no luck")


class Exits:
    @hookimpl
    def quire_providers(self):
        sys.exit(3)


class Wrapper:
    @hookimpl(wrapper=True)
    def quire_providers(self):
        return (yield)


class Returns:
    def __init__(self, value):
        self._value = value

    @hookimpl
    def quire_providers(self):
        return self._value


FAULTS = {
    "import error": (
        FakeEntryPoint("bad", run=raiser(ImportError("no module named x"))),
        "failed to import",
        "no module",
    ),
    "any error": (FakeEntryPoint("bad", run=raiser(ValueError("odd"))), "failed to import", "ValueError: odd"),
    "sys.exit": (FakeEntryPoint("bad", run=raiser(SystemExit(1))), "failed to import", "SystemExit"),
    "misspelt hook": (FakeEntryPoint("bad", Misspelt()), "rejected", "did you mean 'quire_providers'"),
    "no hookimpl": (FakeEntryPoint("bad", Unmarked()), "rejected", "not marked with @hookimpl"),
    "hook argument": (FakeEntryPoint("bad", WrongArgument()), "rejected", "hots"),
    "raises": (FakeEntryPoint("bad", Raises()), "rejected", "no luck"),
    "exits in hook": (FakeEntryPoint("bad", Exits()), "rejected", "SystemExit"),
    "wrapper": (FakeEntryPoint("bad", Wrapper()), "rejected", "wrapper"),
    "returns None": (FakeEntryPoint("bad", Returns(None)), "rejected", "returned None; return a list"),
    "returns text": (FakeEntryPoint("bad", Returns("log")), "rejected", "must yield Provider objects, not str"),
    "returns a number": (FakeEntryPoint("bad", Returns([1])), "rejected", "not int"),
    "future API": (FakeEntryPoint("bad", plugin(sink("x", api=99))), "incompatible", "needs API version 99"),
    "API of a wrong type": (FakeEntryPoint("bad", plugin(sink("x", api=True))), "incompatible", "API version True"),
    "unknown point": (
        FakeEntryPoint("bad", plugin(Provider("atention", "x", "a:b", 1))),
        "incompatible",
        "did you mean 'attention'",
    ),
    "target": (FakeEntryPoint("bad", plugin(sink("x", "no colon"))), "rejected", "package.module:attribute"),
    "probe": (FakeEntryPoint("bad", plugin(sink("x", probe="nope"))), "rejected", "probe"),
    "devices": (FakeEntryPoint("bad", plugin(sink("x", devices="cpu"))), "rejected", "frozenset"),
    "priority": (FakeEntryPoint("bad", plugin(sink("x", priority="high"))), "rejected", "priority"),
    "reserved name": (FakeEntryPoint("bad", plugin(sink("auto"))), "rejected", "auto"),
    "colon in a name": (FakeEntryPoint("bad", plugin(sink("a:b"))), "rejected", "letters"),
    "twice": (FakeEntryPoint("bad", plugin(sink("x"), sink("x"))), "rejected", "twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plugin_is_reported_and_the_others_load(fault, caplog):
    bad, status, reason = FAULTS[fault]
    with caplog.at_level(logging.WARNING):
        host = host_of(FakeEntryPoint("aaa", plugin(sink("first"))), bad, FakeEntryPoint("zzz", plugin(sink("last"))))
    report = host.reports["bad"]
    assert report.status == status
    assert reason in report.reason
    assert report.providers == ()
    assert {name: host.reports[name].status for name in ("core", "aaa", "zzz")} == dict.fromkeys(
        ("core", "aaa", "zzz"), PluginStatus.LOADED
    )
    assert {p.name for p, _ in host.providers("metrics_sink")} == {"first", "last", "log"}
    warning = caplog.text
    assert all(part in warning for part in ("'bad'", "dist-bad", "1.2.3", "-p no:bad", reason))


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_makes_a_fault_fatal(fault):
    bad, _, reason = FAULTS[fault]
    with pytest.raises(PluginError, match="dist-bad") as caught:
        host_of(bad, strict=True)
    assert reason in str(caught.value)


def test_a_keyboard_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        host_of(FakeEntryPoint("bad", run=raiser(KeyboardInterrupt())))


def test_a_rejected_plugin_leaves_no_hook_behind():
    class Half:
        steps = 0

        @hookimpl
        def quire_on_step(self, stats):
            Half.steps += 1

        @hookimpl
        def quire_providers(self, hots):
            return []

    class Late(Half):
        @hookimpl
        def quire_providers(self):
            return [sink("x", api=99)]

    host = host_of(FakeEntryPoint("half", Half()), FakeEntryPoint("late", Late()))
    assert not host.has_hook("quire_on_step")
    host.notify("quire_on_step", stats=None)
    assert Half.steps == 0


def test_blocked_plugins_are_not_imported():
    imported = []
    points = [FakeEntryPoint(name, run=lambda name=name: imported.append(name) or plugin()) for name in ("one", "two")]
    host = host_of(*points, blocked=frozenset({"one"}))
    assert imported == ["two"]
    assert host.reports["one"].status == PluginStatus.BLOCKED
    assert "no:one" in host.reports["one"].reason


def test_an_allow_list_loads_only_what_it_names_and_the_core():
    points = [FakeEntryPoint(name, plugin(sink(name))) for name in ("one", "two")]
    host = host_of(*points, allowed=frozenset({"two"}))
    assert [r.status for r in host.reports.values()] == ["loaded", "blocked", "loaded"]
    assert {p.name for p, _ in host.providers("metrics_sink")} == {"two", "log"}


def test_a_name_in_a_list_that_no_plugin_has_is_pointed_out(caplog):
    host_of(FakeEntryPoint("cuda", plugin()), blocked=frozenset({"cudda"}))
    assert "'cudda'; did you mean 'cuda'?" in caplog.text


def test_the_core_cannot_be_blocked():
    with pytest.raises(ConfigError, match="core"):
        host_of(blocked=frozenset({"core"}))


def test_two_plugins_of_one_name():
    first, second = FakeEntryPoint("twin", plugin(sink("a"))), FakeEntryPoint("twin", plugin(sink("b")))
    second.dist = Dist("other", "9")
    host = host_of(first, second)
    assert host.reports["twin"].status == PluginStatus.LOADED
    assert host.reports["twin@other"].status == PluginStatus.REJECTED
    assert "taken by plugin 'twin' (dist-twin 1.2.3)" in host.reports["twin@other"].reason
    assert [p.name for p, _ in host.providers("metrics_sink")] == ["log", "a"]


def test_a_plugin_called_core_cannot_replace_the_core():
    host = host_of(FakeEntryPoint("core", plugin(sink("evil"))))
    assert host.reports["core"].distribution == "quire"
    assert "evil" not in {p.name for p, _ in host.providers("metrics_sink")}


def test_one_module_under_two_names_is_loaded_once():
    module = types.ModuleType("shared")
    host = host_of(FakeEntryPoint("a", module), FakeEntryPoint("b", module))
    assert host.reports["a"].status == PluginStatus.LOADED
    assert host.reports["b"].status == PluginStatus.REJECTED


def test_every_provider_of_the_core_has_a_target_that_implements_its_point():
    host = host_of()
    for point in host.info.points:
        for candidate in host.explain(point):
            assert candidate.reasons == (), candidate
    for provider in host.reports["core"].providers:
        host.options_for(provider, {})


def test_the_host_info_lists_every_point():
    class Asks:
        @hookimpl
        def quire_providers(self, host):
            assert host.points["attention"] == (1, 1)
            return [sink(host.version.replace(".", "-"))]

    host = host_of(FakeEntryPoint("asks", Asks()))
    assert host.reports["asks"].status == PluginStatus.LOADED, host.reports["asks"].reason
    assert host.reports["asks"].hooks == ("quire_providers",)
