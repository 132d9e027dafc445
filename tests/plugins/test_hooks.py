"""Observers and suggestions: a plugin that raises there is isolated as well."""

from __future__ import annotations

import pytest
from quire.errors import PluginError
from quire.hooks import hookimpl
from quire.registry import HostOptions, PluginHost


class Entry:
    def __init__(self, name, plugin):
        self.name, self._plugin = name, plugin

    def load(self):
        return self._plugin


class Watcher:
    def __init__(self, failures=0):
        self.failures, self.seen = failures, []

    @hookimpl
    def quire_on_step(self, stats):
        self.seen.append(stats)
        if len(self.seen) <= self.failures:
            raise ValueError("watcher broke")

    @hookimpl
    def quire_on_engine_start(self):
        self.seen.append("start")


class Suggests:
    def __init__(self, value):
        self._value = value

    @hookimpl
    def quire_config_defaults(self, config):
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


def host_of(strict=False, **plugins):
    return PluginHost([Entry(name, plugin) for name, plugin in plugins.items()], HostOptions(strict=strict))


def test_every_observer_is_called_with_the_arguments_that_it_asks_for():
    one, two = Watcher(), Watcher()
    host = host_of(one=one, two=two)
    host.notify("quire_on_step", stats=1)
    host.notify("quire_on_engine_start", engine=object())
    assert one.seen == two.seen == [1, "start"]


def test_an_observer_is_muted_after_three_failures(caplog):
    good, bad = Watcher(), Watcher(failures=99)
    host = host_of(bad=bad, good=good)
    for step in range(5):
        host.notify("quire_on_step", stats=step)
    assert good.seen == [0, 1, 2, 3, 4]
    assert bad.seen == [0, 1, 2]
    assert caplog.text.count("ValueError: watcher broke") == 3
    assert caplog.text.count("muted") == 1
    assert "-p no:bad" in caplog.text
    assert host.has_hook("quire_on_step")


def test_two_failures_do_not_mute():
    shaky = Watcher(failures=2)
    host = host_of(shaky=shaky)
    for step in range(5):
        host.notify("quire_on_step", stats=step)
    assert shaky.seen == [0, 1, 2, 3, 4]


def test_nobody_listens():
    assert not host_of().has_hook("quire_on_step")
    bad = Watcher(failures=99)
    host = host_of(bad=bad)
    for step in range(3):
        host.notify("quire_on_step", stats=step)
    assert not host.has_hook("quire_on_step")


def test_suggestions_name_their_plugin_and_the_first_wins():
    host = host_of(a=Suggests({"seed": 1}), b=Suggests({"seed": 2, "block_size": 32}), c=Suggests(None))
    assert host.config_defaults({}) == {"seed": (1, "a"), "block_size": (32, "b")}


@pytest.mark.parametrize("value", [RuntimeError("bad day"), 7, "seed"])
def test_a_plugin_that_fails_to_suggest_is_passed_over(value, caplog):
    host = host_of(a=Suggests(value), b=Suggests({"seed": 2}))
    assert host.config_defaults({}) == {"seed": (2, "b")}
    assert "-p no:a" in caplog.text
    with pytest.raises(PluginError, match="'a'"):
        host_of(strict=True, a=Suggests(value)).config_defaults({})
