"""Runs the kit on an installed provider, without a test file: what `quire plugins test` does.

A kit that has to know more of its subject (sample outputs of a parser, parameters that a processor acts
upon) takes it from the class attribute `conformance` of the target, a mapping of the kit's attributes.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest
import torch

from quire.contract.ops import OpInit
from quire.contract.provider import Provider
from quire.errors import ConfigError
from quire.registry import HostOptions, PluginHost, build_host
from quire.testing.tiny_models import ARCHITECTURES, architecture_of

Verdict = Literal["certified", "failed", "not run"]


ADVICE = "If it fails:"
"""Begins the second part of a check's docstring."""


@dataclass(frozen=True, slots=True)
class Kit:
    """A point's kit.

    Attributes:
        target: `module:class` of the kit. fixture: the fixture that gives the class under test.
        needs: attributes that the provider has to give in `conformance`.
        others: further fixtures, from the host.
    """

    target: str
    fixture: str
    needs: tuple[str, ...] = ()
    others: Callable[[PluginHost], Mapping[str, Any]] = lambda host: {}


def _with_scheduler(host: PluginHost) -> Mapping[str, Any]:
    return {
        "allocator_class": host.load("kv_allocator", "paged"),
        "policy_class": host.load("scheduler_policy", "fcfs"),
    }


def _kit(name: str, kit: str, fixture: str, **more: Any) -> Kit:
    return Kit(f"quire.testing.{name}:{kit}Conformance", fixture, **more)


KITS: Mapping[str, Kit] = MappingProxyType(
    {
        "attention": _kit("attention", "Attention", "backend_class"),
        "kv_allocator": _kit("kv_allocator", "KVAllocator", "allocator_class"),
        "scheduler": _kit("scheduler", "Scheduler", "scheduler_class", others=_with_scheduler),
        "scheduler_policy": _kit("scheduler_policy", "SchedulerPolicy", "policy_class"),
        "sampler": _kit("sampler", "Sampler", "sampler_class"),
        "logits_processor": _kit("logits_processor", "LogitsProcessor", "processor_class", needs=("active_params",)),
        "quantization": _kit("quantization", "Quantization", "method_class"),
        "op": _kit("op", "Op", "op_set"),
        "model": _kit("model", "Model", "spec"),
        "output_parser": _kit("output_parser", "OutputParser", "parser_class", needs=("samples",)),
        "metrics_sink": _kit("metrics_sink", "MetricsSink", "sink_class"),
        "device": _kit("device", "Device", "device_class"),
        "executor": _kit("executor", "Executor", "executor_class", others=lambda host: {"host": host}),
    }
)
"""Extension point -> its kit. A point without one cannot be certified."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that failed: its name, what it saw, what must hold, and how such a failure is mended."""

    check: str
    message: str
    contract: str
    advice: str


@dataclass(frozen=True, slots=True)
class Score:
    """One provider's result; `reason` says why it was not run."""

    point: str
    name: str
    plugin: str
    verdict: Verdict
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str = ""
    failures: tuple[Failure, ...] = field(default=())


def conformance(point: str, name: str, options: HostOptions | None = None) -> type:
    """The kit's class for an installed provider, ready for pytest to collect.

    Raises:
        ConfigError: there is no such provider, no kit for its point, or the kit needs to know more.
    """
    host = build_host(options)
    provider, _ = _find(host, point, name)
    if reason := why_not(host, provider):
        raise ConfigError(f"{point} {name!r} cannot be tested here: {reason}")
    target = host.load(point, name)
    device = {} if not provider.devices or "cpu" in provider.devices else {"device": min(provider.devices)}
    subject = target(OpInit(torch.device(device.get("device", "cpu")), 256)) if point == "op" else target
    return case_of(point, subject, host, **{**getattr(target, "conformance", {}), **device})


def case_of(point: str, subject: Any, host: PluginHost | None = None, **attributes: Any) -> type:
    """The kit's class for any implementation, installed or not, ready for pytest to collect.

    Args:
        point: the extension point. subject: the class under test (of `op` an instance, of `model` the spec).
        host: where other parts come from, such as the allocator that a scheduler runs on.
        attributes: the kit's own, such as `samples`.
    """
    kit = KITS[point]
    fixtures = {kit.fixture: subject, **kit.others(host or build_host())}
    members = {name: staticmethod(value) if inspect.isfunction(value) else value for name, value in attributes.items()}
    members |= {fixture: _fixture(fixture, value) for fixture, value in fixtures.items()}
    return type(f"Test_{point}_{getattr(subject, '__name__', 'subject')}", (_load(kit.target),), members)


def why_not(host: PluginHost, provider: Provider) -> str:
    """Why a provider cannot be tested here; empty if it can."""
    if reason := host.availability(provider):
        return reason
    kit = KITS.get(provider.point)
    if kit is None:
        return "the point has no kit"
    target = host.load(provider.point, provider.name)
    if provider.point == "model" and architecture_of(target) is None:
        return f"the kit can make checkpoints of {', '.join(ARCHITECTURES)} only"
    given = getattr(target, "conformance", {})
    needs = ("sample",) if provider.point == "quantization" and target.checkpoint_names else kit.needs
    missing = [name for name in needs if name not in given]
    if missing:
        return f"the kit needs {missing[0]!r}; give it in the class attribute `conformance`, or in a test file"
    return ""


def certify(host: PluginHost, provider: Provider, plugin: str, junit: Path | None = None) -> Score:
    """Run the kit on a provider in a process of its own; `junit`: where to leave pytest's report."""
    point, name = provider.point, provider.name
    if reason := why_not(host, provider):
        return Score(point, name, plugin, "not run", reason=reason)
    options = host.options
    arguments = {"blocked": sorted(options.blocked), "files": [str(path.absolute()) for path in options.files]}
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "test_provider.py", junit or Path(folder) / "report.xml"
        file.write_text(_test_file(point, name, arguments), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
        command += ["--rootdir", folder, f"--junitxml={report.absolute()}"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if not report.exists():
            reason = (answer.stdout + answer.stderr).strip().splitlines()[-1]
            return Score(point, name, plugin, "failed", reason=f"the kit could not run: {reason}")
        return _score(point, name, plugin, report)


def _test_file(point: str, name: str, arguments: Mapping[str, Any]) -> str:
    return (
        "import json\nfrom pathlib import Path\n"
        "from quire.registry import HostOptions\nfrom quire.testing.certify import conformance\n\n"
        f"given = json.loads({json.dumps(arguments)!r})\n"
        "files = tuple(Path(file) for file in given['files'])\n"
        "options = HostOptions(blocked=frozenset(given['blocked']), files=files)\n"
        f"TestProvider = conformance({point!r}, {name!r}, options)\n"
    )


def _score(point: str, name: str, plugin: str, report: Path) -> Score:
    kit = _load(KITS[point].target)
    passed = failed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            failed += 1
            check = case.get("name", "")
            told = contract_and_advice(getattr(kit, check.partition("[")[0], None))
            failures.append(Failure(check, _first_line(problem.get("message", "")), *told))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    verdict: Verdict = "certified" if passed and not failed else "failed"
    return Score(point, name, plugin, verdict, passed, failed, skipped, failures=tuple(failures))


def contract_and_advice(check: Any) -> tuple[str, str]:
    """The two parts of a check's docstring: what must hold, and what to do if it does not."""
    contract, _, advice = " ".join((getattr(check, "__doc__", "") or "").split()).partition(f" {ADVICE} ")
    return contract, advice


def _find(host: PluginHost, point: str, name: str) -> tuple[Provider, str]:
    for provider, plugin in host.providers(point):
        if name in (provider.name, f"{plugin}:{provider.name}"):
            return provider, plugin
    raise ConfigError(f"there is no {point} called {name!r}", remedy="`quire plugins list` names them")


def _fixture(name: str, value: Any) -> Any:
    def fixed(self: Any) -> Any:
        return value

    fixed.__name__ = name
    return pytest.fixture(fixed)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""
