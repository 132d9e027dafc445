"""`quire plugins test`: right providers are certified, wrong ones told what is wrong and how to mend it."""

import json
import logging
import sys
from pathlib import Path

import pytest
from quire.cli.app import app
from quire.contract.provider import POINTS
from quire.host.objects import import_object
from quire.registry import HostOptions, build_host
from quire.testing.certify import KITS, certify, contract_and_advice, why_not
from typer.testing import CliRunner

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PLUGIN = '''
from quire.plugin import LogitsProcessor, Provider, SchedulerPolicy, hookimpl
from quire import SamplingParams

class Oldest(SchedulerPolicy):
    """First come, first served."""
    def key(self, request, view):
        return (request.arrival_time, request.request_id)

class Forgetful(Oldest):
    def pick_victim(self, running, view):
        return "nobody"

class Unsaid(LogitsProcessor):
    def add(self, slot, request): return False
    def apply(self, logits, ctx): ...

@hookimpl
def quire_providers():
    here = __name__
    yield Provider("scheduler_policy", "oldest", f"{here}:Oldest", 1)
    yield Provider("scheduler_policy", "forgetful", f"{here}:Forgetful", 1)
    yield Provider("logits_processor", "unsaid", f"{here}:Unsaid", 1)
    yield Provider("sampler", "elsewhere", f"{here}:Missing", 1, probe=f"{here}:never")

def never():
    return "needs a machine that nobody has"
'''


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "certified_plugin.py"
    file.write_text(PLUGIN)
    yield file
    sys.modules.pop("certified_plugin", None)


@pytest.fixture
def quire(monkeypatch):
    """Runs the program; (exit code, stdout, stderr). Its log is put back as it was."""
    logger = logging.getLogger("quire")
    before = logger.handlers[:], logger.level, logger.propagate

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="quire")
        return result.exit_code, result.stdout, result.stderr

    yield call
    logger.handlers[:], logger.level, logger.propagate = before


def test_every_point_has_a_kit():
    assert set(POINTS) == set(KITS)


def test_scores_of_one_plugin(quire, plugin_file, tmp_path):
    code, out, _ = quire("--plugin", plugin_file, "plugins", "test", "certified_plugin", "--json", "--junit", tmp_path)
    scores = {score["name"]: score for score in json.loads(out)}
    assert code == 1
    assert scores["oldest"]["verdict"] == "certified"
    assert scores["oldest"]["passed"] >= 4
    assert (scores["oldest"]["failed"], scores["oldest"]["failures"]) == (0, [])
    (first, *_) = scores["forgetful"]["failures"]
    assert scores["forgetful"]["verdict"] == "failed"
    assert "victim" in first["check"] + first["message"] + first["advice"]
    assert "one of the requests" in first["contract"]
    assert "request_id" in first["advice"]
    assert "active_params" in scores["unsaid"]["reason"]
    assert scores["elsewhere"]["reason"] == "needs a machine that nobody has"
    assert [scores[name]["verdict"] for name in ("unsaid", "elsewhere")] == ["not run", "not run"]
    assert (tmp_path / "scheduler_policy-oldest.xml").read_text().startswith("<?xml")


def test_the_table_names_what_failed(quire, plugin_file):
    code, out, err = quire(
        "--plugin", plugin_file, "plugins", "test", "certified_plugin", "--point", "scheduler_policy"
    )
    assert code == 1
    assert "oldest" in out
    assert "certified" in out
    assert "forgetful: test_" in out
    assert "testing scheduler_policy oldest" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cpu_reff",), "did you mean 'cpu_ref'"),
        (("cpu_ref", "--point", "sampler"), "offers nothing to test for sampler"),
        (("server",), "offers nothing to test"),
    ],
)
def test_what_cannot_be_tested_is_told(quire, arguments, words):
    code, _, err = quire("plugins", "test", *arguments)
    assert (code, words in err) == (2, True), err


@pytest.mark.parametrize(("point", "name"), [("logits_processor", "penalties"), ("output_parser", "qwen")])
def test_own_samples_are_used(point, name):
    host = build_host(HostOptions())
    (found,) = [(provider, plugin) for provider, plugin in host.providers(point) if provider.name == name]
    score = certify(host, *found)
    assert (score.verdict, score.failed) == ("certified", 0), score
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {point} |")]
    assert row.endswith(f"| certified | {score.passed} each |")


def test_everything_of_our_own_can_be_certified_here():
    host = build_host(HostOptions())
    not_run = {
        provider.name: reason
        for point in KITS
        for provider, _ in host.providers(point)
        if provider.devices in (frozenset(), frozenset({"cpu"})) and (reason := why_not(host, provider))
    }
    assert not_run == {}


CHECKS = [(kit, name) for kit in KITS.values() for name in dir(import_object(kit.target)) if name.startswith("test_")]


@pytest.mark.parametrize(("kit", "name"), CHECKS, ids=lambda value: getattr(value, "target", value))
def test_every_check_says_what_must_hold_and_how_to_mend_it(kit, name):
    contract, advice = contract_and_advice(getattr(import_object(kit.target), name))
    assert len(contract) > 20
    assert len(advice) > 20
    assert contract.endswith(".")
    assert advice.endswith(".")
