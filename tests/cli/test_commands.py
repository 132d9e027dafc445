"""The program in this process: what each command prints, and the exit codes."""

from __future__ import annotations

import json
import logging
import tomllib

import pytest
import yaml
from quire.cli.app import app
from quire.config import EngineConfig, configure, field_paths, read_file
from quire.version import __version__
from typer.testing import CliRunner

PLUGIN = '''
import typer
from quire.plugin import MetricsSink, Provider, hookimpl


class Sink(MetricsSink):
    def record_step(self, stats):
        pass


@hookimpl
def quire_providers(host):
    return [Provider("metrics_sink", "cli_sink", f"{__name__}:Sink", api=1, summary="counts [nothing]")]


@hookimpl
def quire_config_defaults(config):
    return {"block_size": 8}


@hookimpl
def quire_cli(app: typer.Typer):
    @app.command()
    def greet(name: str):
        """Greet."""
        typer.echo(f"hello {name}")

    @app.command()
    def version():
        typer.echo("mine")
'''


@pytest.fixture(autouse=True)
def quiet():
    """The program sets up the log of `quire`; other tests expect it untouched."""
    logger = logging.getLogger("quire")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def quire():
    return lambda *arguments, **more: CliRunner().invoke(app, [str(a) for a in arguments], prog_name="quire", **more)


@pytest.fixture
def plugin_file(tmp_path):
    import sys

    file = tmp_path / "cli_test_plugin.py"
    file.write_text(PLUGIN)
    yield file
    sys.modules.pop("cli_test_plugin", None)


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(quire, arguments):
    result = quire(*arguments)
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)


def test_help_lists_the_commands(quire):
    result = quire("--help")
    assert result.exit_code == 0
    for name in ("run", "plugins", "config", "check", "bench", "version", "--strict-plugins", "--plugin", "-p"):
        assert name in result.stdout


def test_plugins_list(quire):
    result = quire("plugins", "list")
    assert result.exit_code == 0
    for part in ("cpu_ref", "loaded", "kv_allocator", "paged", "stable", "provisional", "plain torch"):
        assert part in result.stdout
    plugins = {plugin["name"]: plugin for plugin in json.loads(quire("plugins", "list", "--json").stdout)}
    assert plugins["core"]["status"] == "loaded"
    assert plugins["core"]["version"] == __version__
    attention = [p for p in plugins["cpu_ref"]["providers"] if p["point"] == "attention"]
    assert attention[0]["name"] == "cpu_ref"
    assert attention[0]["unavailable"] == ""


def test_a_plugin_can_be_left_out(quire):
    result = quire("-p", "no:cpu_ref", "plugins", "list", "--json")
    plugins = {plugin["name"]: plugin for plugin in json.loads(result.stdout)}
    assert plugins["cpu_ref"]["status"] == "blocked"
    assert "no:cpu_ref" in plugins["cpu_ref"]["reason"]
    assert plugins["cpu_ref"]["providers"] == []
    assert quire("-p", "cpu_ref", "plugins", "list").exit_code == 2


def test_an_allow_list_in_the_configuration(quire, tmp_path):
    file = tmp_path / "hard.yaml"
    file.write_text("plugins: {allowed: [quant]}\n")
    plugins = json.loads(quire("-c", file, "plugins", "list", "--json").stdout)
    assert {p["name"]: p["status"] for p in plugins} == {
        "core": "loaded",
        "cpu_native": "blocked",
        "cpu_ref": "blocked",
        "cuda_paged": "blocked",
        "quant": "loaded",
        "server": "blocked",
    }


def test_a_plugin_in_a_file(quire, plugin_file):
    assert "counts [nothing]" in quire("--plugin", plugin_file, "plugins", "list").stdout
    result = quire("--plugin", plugin_file, "greet", "you")
    assert (result.exit_code, result.stdout) == (0, "hello you\n")
    assert quire("--plugin", plugin_file, "version").stdout.strip() == __version__
    assert quire("greet", "you").exit_code == 2


def test_help_lists_the_commands_that_the_options_before_it_leave(quire, plugin_file):
    assert "Greet." in quire("--plugin", plugin_file, "--help").stdout
    assert "Greet." not in quire("--plugin", plugin_file, "-p", f"no:{plugin_file.stem}", "--help").stdout


def test_a_plugin_that_fails_to_add_commands_is_passed_over(quire, tmp_path, plugin_file):
    import sys

    bad = tmp_path / "bad_cli_plugin.py"
    bad.write_text(
        "from quire.plugin import hookimpl, ConfigError\n\n\n@hookimpl\ndef quire_cli(app):\n"
        "    @app.command()\n    def half():\n        raise ConfigError('half done', remedy='finish it')\n\n    1 / 0\n"
    )
    result = quire("--plugin", bad, "--plugin", plugin_file, "greet", "you")
    assert (result.exit_code, result.stdout) == (0, "hello you\n")
    assert "bad_cli_plugin.py): hook quire_cli failed (ZeroDivisionError: division by zero)" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in quire("--debug", "--plugin", bad, "--plugin", plugin_file, "greet", "you").stderr
    half = quire("--plugin", bad, "half")
    assert half.exit_code == 2
    assert "finish it" in half.stderr
    sys.modules.pop("bad_cli_plugin", None)


def test_a_plugins_command_that_a_bad_configuration_hides_is_not_called_unknown(quire, tmp_path):
    (tmp_path / "bad.yaml").write_text("max_num_sequences: 3\n")
    result = quire("-c", tmp_path / "bad.yaml", "serve")
    assert result.exit_code == 2
    assert "unknown key 'max_num_sequences'" in result.output
    assert "No such command" not in result.output
    result = quire("-c", tmp_path / "bad.yaml", "--help")
    assert result.exit_code == 0
    assert "plugins' commands are not available" in result.output
    assert quire("-c", tmp_path / "bad.yaml", "version").output.strip() == __version__
    assert "No such command" in quire("greeet").output


def test_the_variable_for_allowed_plugins(quire, monkeypatch):
    monkeypatch.setenv("QUIRE_PLUGINS", "cpu_ref")
    plugins = json.loads(quire("plugins", "list", "--json").stdout)
    assert {p["name"]: p["status"] for p in plugins} == {
        "core": "loaded",
        "cpu_native": "blocked",
        "cpu_ref": "loaded",
        "cuda_paged": "blocked",
        "quant": "blocked",
        "server": "blocked",
    }


def test_strict_plugins(quire, tmp_path):
    file = tmp_path / "broken_cli_plugin.py"
    file.write_text("raise RuntimeError('broken')\n")
    lenient = quire("--plugin", file, "plugins", "list")
    assert lenient.exit_code == 0
    assert "failed to import" in lenient.stdout
    assert "-p no:broken_cli_plugin" in lenient.stderr
    strict = quire("--strict-plugins", "--plugin", file, "plugins", "list")
    assert strict.exit_code == 1
    assert "broken" in strict.stderr


def test_explain(quire, chat_model):
    result = quire("plugins", "explain", "attention", "-m", chat_model)
    assert result.exit_code == 0
    assert "cpu_ref" in result.stdout
    models = json.loads(quire("plugins", "explain", "model", "-m", chat_model, "--json").stdout)
    assert [m["name"] for m in models if m["chosen"]] == ["llama"]
    assert all(m["reasons"] or m["note"] for m in models if not m["chosen"])
    unknown = quire("plugins", "explain", "atention")
    assert unknown.exit_code == 2
    assert "did you mean 'attention'?" in unknown.stderr


def test_config_show_names_the_origin_of_each_value(quire, chat_model, plugin_file, tmp_path, monkeypatch):
    file = tmp_path / "quire.yaml"
    file.write_text("engine: {max_num_seqs: 7}\n")
    monkeypatch.setenv("QUIRE_ENGINE__SEED", "5")
    result = quire("--plugin", plugin_file, "-c", file, "config", "show", "--model", chat_model,
                   "--max-model-len", "200", "--ops", "linear=torch",
                   "--no-enable-prefix-caching", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert set(shown) == set(field_paths())
    assert shown["engine.max_num_seqs"] == {"value": 7, "origin": str(file)}
    assert shown["engine.seed"] == {"value": 5, "origin": "environment"}
    assert shown["engine.max_model_len"] == {"value": 200, "origin": "flag"}
    assert shown["engine.kv_cache.block_size"] == {"value": 8, "origin": "plugin cli_test_plugin"}
    assert shown["engine.kv_cache.prefix_caching"] == {"value": False, "origin": "flag"}
    assert shown["plugins.ops"]["value"] == {"linear": "torch"}
    assert shown["model.dtype"] == {"value": "float32", "origin": "default, then decided"}
    assert shown["engine.kv_cache.memory"] == {"value": "auto", "origin": "default"}
    assert "engine.seed" in quire("config", "show", "--model", chat_model).stdout


def test_every_field_is_a_flag(quire):
    shown = quire("config", "show", "--help", env={"COLUMNS": "200"}).stdout
    for name in EngineConfig.model_fields:
        assert "--" + name.replace("_", "-")[:18] in shown


def test_the_schema_covers_every_field(quire):
    schema = json.loads(quire("config", "schema").stdout)
    for path, name in field_paths().items():
        node = schema
        for part in path.split("."):
            assert node.get("additionalProperties", False) is False
            node = node["properties"][part]
        assert node["description"] == EngineConfig.model_fields[name].description


def test_config_init_is_a_file_of_defaults(quire, tmp_path):
    text = quire("config", "init").stdout
    assert yaml.safe_load(text) is None
    uncommented = "\n".join(
        line[1:] for line in text.splitlines() if line.startswith("#") and not line.lstrip("# ").startswith("Quire")
    )
    file = tmp_path / "full.yaml"
    file.write_text("\n".join(line for line in uncommented.splitlines() if not line.startswith(" Each")))
    assert set(read_file(file)) == set(EngineConfig.model_fields)
    assert configure({}, file=file, environment={}).config == EngineConfig()


def test_check(quire):
    result = quire("check", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["quire"] == __version__
    assert found["plugin cpu_ref"] == "loaded"
    assert "GiB free" in found["device cpu"]
    assert {"torch", "torch threads", "cpus", "hub cache", "model quire-tiny"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["nosuch"], 2, "nosuch"),
        (["run", "/no/such/folder", "hi"], 3, "/no/such/folder"),
        (["config", "show", "--max-num-seqs", "0"], 2, "max_num_seqs"),
        (["config", "show", "--ops", "torch"], 2, "KEY=VALUE"),
        (["config", "show", "--plugin-options", "a=1"], 2, "NAME.OPTION=VALUE"),
        (["-c", "/no/such.yaml", "config", "show"], 2, "/no/such.yaml"),
        (["--plugin", "/no/such.py", "plugins", "list"], 2, "/no/such.py"),
        (["bench", "--batch", "many"], 2, "--batch"),
    ],
)
def test_errors_are_a_cause_and_a_remedy_without_a_traceback(quire, arguments, code, cause):
    result = quire(*arguments)
    assert result.exit_code == code
    assert cause in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(quire):
    result = quire("--debug", "run", "/no/such/folder", "hi")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


def test_the_log_level_is_checked(quire, monkeypatch):
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "loud")
    result = quire("plugins", "list")
    assert result.exit_code == 2
    assert "QUIRE_LOG_LEVEL is 'loud'" in result.stderr


def test_pyproject_names_the_program():
    from pathlib import Path

    root = Path(__file__).parents[2]
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["quire"] == "quire.cli:main"


def test_a_plugins_command_beside_one_of_the_core(quire, tmp_path):
    (tmp_path / "beside.py").write_text(
        "import typer\nfrom quire.plugin import hookimpl\n\n\n@hookimpl\ndef quire_cli(app):\n"
        "    app.command('bench mine')(lambda: typer.echo('measured'))\n"
        "    app.command('run mine')(lambda: typer.echo('never'))\n"
    )
    own = ("--plugin", tmp_path / "beside.py")
    assert quire(*own, "bench", "mine").stdout == "measured\n"
    assert "bench mine" in quire(*own, "--help").stdout
    other = quire(*own, "bench", "./nowhere")  # a model, as ever
    assert other.exit_code == 3
