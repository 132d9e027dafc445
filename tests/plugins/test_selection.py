"""Which provider is taken: auto by priority with reasons, a named one strictly."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field
from quire.errors import ConfigError, PluginError
from quire.hooks import hookimpl
from quire.plugin import MetricsInit, MetricsSink, Provider
from quire.registry import HostOptions, PluginHost


class Good(MetricsSink):
    def record_step(self, stats):
        pass


class Hollow(MetricsSink):
    pass


class Stranger:
    pass


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    interval: int = Field(default=5, ge=1)


class Loose(BaseModel):
    interval: int = 5


class Needy(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str


def refuses():
    return "no such chip"


def explodes():
    raise RuntimeError("probe broke")


def fits():
    return None


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Targets name this module, which pytest does not import by its own name."""
    import sys

    module = type(sys)("selection_targets")
    vars(module).update({name: value for name, value in globals().items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "selection_targets", module)


def offer(name, target="Good", *, point="metrics_sink", probe=None, options=None, **fields):
    return Provider(
        point,
        name,
        target if ":" in target else f"selection_targets:{target}",
        1,
        probe=f"selection_targets:{probe}" if probe else None,
        options=f"selection_targets:{options}" if options else None,
        **fields,
    )


class Entry:
    def __init__(self, name, *providers):
        self.name = name
        self._providers = providers

    def load(self):
        providers = self._providers

        class Plugin:
            @hookimpl
            def quire_providers(self):
                return providers

        return Plugin()


def host_of(**plugins):
    return PluginHost([Entry(name, *providers) for name, providers in plugins.items()], HostOptions())


def test_auto_takes_the_highest_priority_that_fits_and_says_why_others_do_not():
    host = host_of(
        acme=[
            offer("gpu", devices=frozenset({"cuda"}), priority=60),
            offer("chip", probe="refuses", priority=50),
            offer("shaky", probe="explodes", priority=40),
            offer("gone", "no_such_module_here:X", priority=30),
            offer("attribute", "Nothing", priority=29),
            offer("hollow", "Hollow", priority=28),
            offer("stranger", "Stranger", priority=27),
            offer("picky", priority=26),
            offer("right", probe="fits", priority=20),
            offer("spare", priority=10),
        ]
    )
    check_calls = []

    def check(target):
        check_calls.append(target)
        return ["not today"] if len(check_calls) == 1 else []

    chosen = host.select("metrics_sink", device_type="cpu", check=check)
    assert (chosen.provider.name, chosen.plugin, chosen.target) == ("right", "acme", Good)
    reasons = {item.provider.name: item.reasons[0] for item in chosen.rejected}
    assert list(reasons) == ["gpu", "chip", "shaky", "gone", "attribute", "hollow", "stranger", "picky"]
    for name, part in {
        "gpu": "not on cpu",
        "chip": "no such chip",
        "shaky": "probe broke",
        "gone": "no_such_module_here",
        "attribute": "Nothing",
        "hollow": "record_step",
        "stranger": "not a subclass of MetricsSink",
        "picky": "not today",
    }.items():
        assert part in reasons[name]
    assert chosen.passed_over == (("spare", "acme"), ("log", "core"))
    assert chosen.name == "acme:right"
    chosen.target(MetricsInit("m"))


def test_explain_agrees_with_select():
    host = host_of(acme=[offer("chip", probe="refuses", priority=50), offer("right", priority=20), offer("spare")])
    table = {item.provider.name: item for item in host.explain("metrics_sink")}
    assert [name for name, item in table.items() if item.chosen] == ["right"]
    assert table["chip"].reasons == ("no such chip",)
    assert table["spare"].note == "acme:right stands before it"
    named = {item.provider.name: item for item in host.explain("metrics_sink", "spare")}
    assert named["spare"].chosen
    assert "was asked for" in named["right"].note
    assert host.availability(table["chip"].provider) == "no such chip"
    assert host.availability(table["right"].provider) == ""


def test_a_named_provider_never_falls_back():
    host = host_of(acme=[offer("chip", probe="refuses"), offer("right", priority=5)])
    with pytest.raises(ConfigError, match="'chip' cannot be used: no such chip"):
        host.select("metrics_sink", "chip")


def test_no_provider_fits():
    host = host_of(acme=[offer("q", point="quantization")])
    with pytest.raises(ConfigError, match=r"no quantization can be used here: q: .*QuantMethod"):
        host.select("quantization")
    with pytest.raises(ConfigError, match="no plugin provides one"):
        host_of().select("quantization")


def test_an_unknown_name_gets_a_suggestion_and_the_plugins_that_are_missing():
    class Broken(Entry):
        def load(self):
            raise ImportError("libfoo.so is missing")

    host = PluginHost([Entry("acme", offer("right")), Broken("cuda_paged")], HostOptions())
    with pytest.raises(ConfigError) as caught:
        host.select("metrics_sink", "rigth")
    assert "did you mean 'right'?" in str(caught.value)
    assert "cuda_paged (failed to import: ImportError: libfoo.so is missing)" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        host.select("atention")


def test_a_shared_name_must_be_qualified():
    host = host_of(one=[offer("same", priority=1)], two=[offer("same", priority=2)])
    with pytest.raises(ConfigError, match="several plugins") as caught:
        host.select("metrics_sink", "same")
    assert "one:same" in str(caught.value)
    assert "two:same" in str(caught.value)
    assert host.select("metrics_sink", "one:same").plugin == "one"
    assert host.select("metrics_sink").plugin == "two"


def test_equal_priorities_are_ordered_by_name_whatever_was_installed_first():
    providers = [offer(name, priority=1) for name in ("c", "a", "b")]
    assert [p.name for p, _ in host_of(x=providers).providers("metrics_sink")] == ["a", "b", "c", "log"]


def test_options_are_validated_by_the_plugins_own_model():
    host = host_of(acme=[offer("timed", options="Options"), offer("plain"), offer("needy", options="Needy")])
    timed = host.select("metrics_sink", "timed").provider
    plain = host.select("metrics_sink", "plain").provider
    assert host.options_for(timed, {}).interval == 5
    assert host.options_for(timed, {"timed": {"interval": 2}}).interval == 2
    assert host.options_for(timed, {"acme:timed": {"interval": 3}}).interval == 3
    assert host.options_for(timed, {"metrics_sink.timed": {"interval": 4}}).interval == 4
    assert host.options_for(plain, {"timed": {"interval": 2}}) is None
    with pytest.raises(ConfigError, match=r"no option 'intervall'.*did you mean 'interval'"):
        host.options_for(timed, {"timed": {"intervall": 2}})
    with pytest.raises(ConfigError, match="'interval' of metrics_sink 'timed' is 0"):
        host.options_for(timed, {"timed": {"interval": 0}})
    with pytest.raises(ConfigError, match="given twice"):
        host.options_for(timed, {"timed": {}, "acme:timed": {}})
    with pytest.raises(ConfigError, match="a mapping is needed"):
        host.options_for(timed, {"timed": 3})
    with pytest.raises(ConfigError, match="'url'"):
        host.options_for(host.select("metrics_sink", "needy").provider, {})


def test_option_names_are_checked():
    host = host_of(acme=[offer("timed", options="Options"), offer("plain")])
    host.check_option_names({"timed": {"interval": 1}})
    with pytest.raises(ConfigError, match=r"no loaded plugin provides.*did you mean 'timed'"):
        host.check_option_names({"timmed": {}})
    with pytest.raises(ConfigError, match="'plain' takes no options"):
        host.check_option_names({"plain": {"interval": 1}})
    with pytest.raises(ConfigError, match="intervall"):
        host.check_option_names({"timed": {"intervall": 1}})


def test_an_ambiguous_option_key_must_be_qualified():
    host = host_of(
        acme=[offer("torch", options="Options"), offer("torch", point="executor", options="Options"), offer("x")]
    )
    with pytest.raises(ConfigError, match="could mean several") as caught:
        host.check_option_names({"torch": {}})
    assert "executor.torch" in str(caught.value)
    host.check_option_names({"executor.torch": {}})


def test_an_options_model_must_forbid_what_it_does_not_know():
    host = host_of(acme=[offer("loose", options="Loose"), offer("lost", options="Nowhere")])
    for name in ("loose", "lost"):
        with pytest.raises(PluginError):
            host.options_for(host.select("metrics_sink", name).provider, {})
