"""Version N+1 of a point beside N and N-1: served, served through an adapter with a warning, refused with the mend."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from abc import abstractmethod

import pytest
from quire.contract.provider import POINTS
from quire.errors import ConfigError, PluginError
from quire.hooks import hookimpl
from quire.plugin import PolicyInit, Provider, RequestView, SchedulerPolicy, SchedulerView
from quire.registry import HostOptions, PluginHost, PluginStatus

VIEW = SchedulerView(now=60.0, num_running=3, num_waiting=5, free_blocks=10, total_blocks=20, max_num_seqs=8,
                     max_num_batched_tokens=256)  # fmt: skip
REQUEST = RequestView("r", 10.0, 0, 5, 0, 0, 100, 0)


class PolicyOfTwo(SchedulerPolicy):
    """The contract's next version: `key` is given the whole view, not only the time."""

    @abstractmethod
    def key(self, request, view): ...


def from_one(target):
    """What the core would keep, to serve version 1 beside version 2."""

    class Adapted(PolicyOfTwo):
        def __init__(self, init):
            super().__init__(init)
            self._inner = target(init)

        def key(self, request, view):
            return self._inner.key(request, view.now)

    return Adapted


class WrittenForOne(SchedulerPolicy):
    def key(self, request, now):
        return (now - request.arrival_time,)


class WrittenForTwo(PolicyOfTwo):
    def key(self, request, view):
        return (view.num_running,)


class Entry:
    def __init__(self, api, target):
        self.name = "mine"
        self.dist = types.SimpleNamespace(name="mine-dist", version="1.4")
        self._provider = Provider("scheduler_policy", "mine", f"policies_of_versions:{target}", api)

    def load(self):
        provider = self._provider

        class Plugin:
            @hookimpl
            def quire_providers(self):
                return [provider]

        return Plugin()


@pytest.fixture
def points(monkeypatch):
    """The table of a host that is one version further."""
    module = types.ModuleType("policies_of_versions")
    module.__dict__.update({cls.__name__: cls for cls in (PolicyOfTwo, WrittenForOne, WrittenForTwo)})
    module.from_one = from_one
    monkeypatch.setitem(sys.modules, module.__name__, module)
    newer = dataclasses.replace(
        POINTS["scheduler_policy"],
        base="policies_of_versions:PolicyOfTwo",
        oldest=1,
        current=2,
        adapters={1: "policies_of_versions:from_one"},
    )
    return {**POINTS, "scheduler_policy": newer}


def host_of(points, api, target, **options):
    return PluginHost([Entry(api, target)], HostOptions(**options), points)


def test_the_next_version_is_served_in_silence(points, caplog):
    host = host_of(points, 2, "WrittenForTwo")
    policy = host.load("scheduler_policy", "mine")(PolicyInit())
    assert policy.key(REQUEST, VIEW) == (3,)
    assert "mine" not in caplog.text
    assert host.info.points["scheduler_policy"] == (1, 2)


def test_the_cores_own_go_the_same_way(points):
    policy = host_of(points, 2, "WrittenForTwo").load("scheduler_policy", "fcfs")(PolicyInit())
    assert policy.key(REQUEST, VIEW) == (10.0,)


def test_the_version_before_works_through_an_adapter_and_is_warned_of(points, caplog):
    with caplog.at_level(logging.WARNING):
        host = host_of(points, 1, "WrittenForOne")
    policy = host.load("scheduler_policy", "mine")(PolicyInit())
    assert policy.key(REQUEST, VIEW) == (50.0,)
    assert host.reports["mine"].status is PluginStatus.LOADED
    for part in ("'mine'", "mine-dist 1.4", "API version 1", "2 is current", "pip install --upgrade mine-dist"):
        assert part in caplog.text


@pytest.mark.parametrize(
    ("api", "words", "line"),
    [(0, "serves 1 to 2", "pip install --upgrade mine-dist"), (3, "serves 1 to 2", "pip install --upgrade quire")],
)
def test_what_is_too_old_or_too_new_is_refused_with_the_line_to_type(points, caplog, api, words, line):
    with caplog.at_level(logging.WARNING):
        host = host_of(points, api, "WrittenForOne")
    report = host.reports["mine"]
    assert report.status is PluginStatus.INCOMPATIBLE
    for part in ("scheduler_policy 'mine'", f"API version {api}", words, line):
        assert part in report.reason
        assert part in caplog.text
    with pytest.raises(ConfigError, match=r"incompatible.*API version"):
        host.load("scheduler_policy", "mine")
    with pytest.raises(PluginError, match="no:mine"):
        host_of(points, api, "WrittenForOne", strict=True)


def test_a_version_without_an_adapter_only_lacks_what_was_added(points):
    grown = dataclasses.replace(points["scheduler_policy"], base=POINTS["scheduler_policy"].base, adapters={})
    host = host_of({**points, "scheduler_policy": grown}, 1, "WrittenForOne")
    assert host.load("scheduler_policy", "mine") is WrittenForOne


def test_an_adapter_that_fails_is_a_reason(points):
    broken = dataclasses.replace(points["scheduler_policy"], adapters={1: "policies_of_versions:gone"})
    host = host_of({**points, "scheduler_policy": broken}, 1, "WrittenForOne")
    with pytest.raises(ConfigError, match="gone"):
        host.load("scheduler_policy", "mine")


def test_a_plugin_in_a_file_is_told_to_change_its_number(tmp_path, points, caplog):
    file = tmp_path / "old_policy.py"
    file.write_text(
        "from quire.plugin import Provider, hookimpl\n\n\n@hookimpl\ndef quire_providers():\n"
        "    return [Provider('scheduler_policy', 'x', 'old_policy:X', 0)]\n"
    )
    host = PluginHost([], HostOptions(files=(file,)), points)
    sys.modules.pop("old_policy", None)
    assert "bring the file up to date" in host.reports["old_policy"].reason
