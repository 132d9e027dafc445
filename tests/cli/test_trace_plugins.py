"""`--trace-plugins`: each step of discovery, hooks and selection on stderr, with its time and its reason."""

import re
import sys

import pytest
from quire.cli.app import app
from typer.testing import CliRunner

PLUGIN = """
from quire.plugin import Provider, hookimpl

@hookimpl
def quire_providers():
    yield Provider("metrics_sink", "traced", "traced_plugin:Missing", 1, probe="traced_plugin:why")

def why():
    return "needs rain"
"""


@pytest.fixture
def quire():
    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="quire")
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "traced_plugin.py"
    file.write_text(PLUGIN)
    yield file
    sys.modules.pop("traced_plugin", None)


def test_every_step_is_told_on_stderr(quire, file):
    code, out, err = quire("--trace-plugins", "-p", "no:quant", "--plugin", file, "plugins", "explain", "attention")
    assert code == 0, err
    assert "plugins:" not in out
    steps = [line for line in err.splitlines() if line.startswith("plugins: ")]
    for words in (
        r"find entry points of group 'quire': .*cpu_ref.* \[\d+\.\d ms\]",
        r"plugin 'quant' .*blocked by -p no:quant",
        r"import plugin 'cpu_ref' .*\[\d+\.\d ms\]",
        r"call quire_providers of 'traced_plugin': metrics_sink traced \[",
        r"call quire_config_sections of 'server'",
        r"consider attention 'cuda_paged', priority \d+: runs on cuda, not on cpu \[",
        r"consider attention 'cpu_ref', .*: can be used \[",
        r"select device \(auto\): (cpu_native:cpu_native|cpu_ref:cpu)",
    ):
        assert any(re.search(words, step) for step in steps), (words, err)


def test_a_probe_tells_its_reason_and_nothing_is_told_without_the_option(quire, file):
    _, _, err = quire("--trace-plugins", "--plugin", file, "plugins", "list")
    assert re.search(r"probe traced_plugin:why: needs rain \[\d+\.\d ms\]", err)
    _, _, err = quire("plugins", "list")
    assert "plugins: " not in err
