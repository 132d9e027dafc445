"""Where values come from and who wins: flags, environment, file, plugins, defaults; and errors that help."""

from __future__ import annotations

import pytest
from quire.config import (
    EngineConfig,
    configure,
    environment_variable,
    field_path,
    field_paths,
    from_env,
    read_file,
    special_variable,
    with_defaults,
)
from quire.errors import ConfigError, PluginError

YAML = """
model: {path: from/file, dtype: bfloat16}
engine:
  seed: 3
  max_model_len: 8Ki
  kv_cache: {block_size: 32, memory: 2GiB}
plugins:
  ops: {rms_norm: torch}
  blocked: [quant]
  options: {radix: {depth: 2}}
"""
TOML = """
[model]
path = "from/file"
dtype = "bfloat16"
[engine]
seed = 3
max_model_len = "8Ki"
[engine.kv_cache]
block_size = 32
memory = "2GiB"
[plugins]
ops = {rms_norm = "torch"}
blocked = ["quant"]
options = {radix = {depth = 2}}
"""


@pytest.fixture(params=["yaml", "toml"])
def file(request, tmp_path):
    path = tmp_path / f"quire.{request.param}"
    path.write_text(YAML if request.param == "yaml" else TOML)
    return path


def test_a_file_groups_the_flat_fields(file):
    configured = configure({}, file=file, environment={})
    config = configured.config
    assert (config.model, config.dtype, config.seed) == ("from/file", "bfloat16", 3)
    assert (config.max_model_len, config.block_size, config.kv_cache_memory) == (8192, 32, 2 << 30)
    assert config.ops == {"rms_norm": "torch"}
    assert config.blocked_plugins == ("quant",)
    assert config.plugin_options == {"radix": {"depth": 2}}
    assert set(configured.origins.values()) == {str(file)}
    assert "max_num_seqs" not in configured.origins


def test_the_order_of_the_sources(file):
    environment = {"QUIRE_ENGINE__SEED": "4", "QUIRE_MODEL__DTYPE": "float32", "QUIRE_ENGINE__MAX_NUM_SEQS": "9"}
    configured = configure({"seed": 5, "device": "cpu"}, file=file, environment=environment, origin="flag")
    config = with_defaults(configured, {"seed": (6, "acme"), "sampler": ("fast", "acme")})
    assert (config.config.seed, config.origins["seed"]) == (5, "flag")
    assert (config.config.dtype, config.origins["dtype"]) == ("float32", "environment")
    assert (config.config.block_size, config.origins["block_size"]) == (32, str(file))
    assert (config.config.sampler, config.origins["sampler"]) == ("fast", "plugin acme")
    assert config.config.max_num_seqs == 9
    assert config.config.executor == "auto"


def test_every_field_can_be_set_from_every_source(tmp_path):
    """One value per field, through the file and through the environment, gives the same configuration."""
    texts = {
        "dtype": "float16",
        "kv_cache_dtype": "fp8_e4m3",
        "max_model_len": "4k",
        "kv_cache_memory": "1MiB",
        "deterministic": "true",
        "async_scheduling": "true",
        "process": "true",
        "enable_prefix_caching": "false",
        "ops": "{default: torch}",
        "plugin_options": "{radix: {a: 1}}",
        "logits_processors": "[a, b]",
        "metrics_sinks": "[log]",
        "allowed_plugins": "[cpu_ref]",
        "blocked_plugins": "[quant]",
    }
    numbers = {"max_num_seqs", "max_num_batched_tokens", "seed", "step_timeout", "block_size", "chat_template_timeout"}
    fields = [name for name in EngineConfig.model_fields if name != "num_kv_blocks"]
    texts = {name: texts.get(name, "7" if name in numbers else f"a-{name}") for name in fields}
    tree: dict = {}
    for name, text in texts.items():
        *parents, last = field_path(name).split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = text

    def lines(node, indent=0):
        for key, value in node.items():
            if isinstance(value, dict):
                yield f"{' ' * indent}{key}:"
                yield from lines(value, indent + 2)
            else:
                yield f"{' ' * indent}{key}: {value}"

    path = tmp_path / "all.yaml"
    path.write_text("\n".join(lines(tree)))
    by_file = configure({}, file=path, environment={}).config
    by_environment = configure({}, environment={environment_variable(n): t for n, t in texts.items()}).config
    assert by_file == by_environment
    defaults = EngineConfig()
    assert [name for name in fields if getattr(by_file, name) == getattr(defaults, name)] == []


def test_paths_are_unique_and_grouped():
    assert len(field_paths()) == len(EngineConfig.model_fields)
    assert {path.split(".")[0] for path in field_paths()} == {"model", "engine", "plugins", "quant"}


def test_single_keys_of_mappings_from_the_environment():
    values = from_env(
        {
            "QUIRE_PLUGINS__OPS__DEFAULT": "torch",
            "QUIRE_PLUGINS__OPS__RMS_NORM": "fast",
            "QUIRE_PLUGINS__OPTIONS__RADIX__DEPTH": "3",
            "QUIRE_PLUGINS__OPTIONS__CPU__THREADS": "2",
            "PATH": "/bin",
        }
    )
    assert values == {
        "ops": {"default": "torch", "rms_norm": "fast"},
        "plugin_options": {"radix": {"depth": 3}, "cpu": {"threads": 2}},
    }


def test_the_special_variables(monkeypatch):
    assert from_env({"QUIRE_PLUGINS": "a, b", "QUIRE_LOG_LEVEL": "debug", "QUIRE_CACHE_DIR": "/x"}) == {
        "allowed_plugins": "a, b"
    }
    assert configure({}, environment={"QUIRE_PLUGINS": "a, b"}).config.allowed_plugins == ("a", "b")
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "info")
    monkeypatch.setenv("QUIRE_CACHE_DIR", "")
    assert special_variable("QUIRE_LOG_LEVEL") == "info"
    assert special_variable("QUIRE_CACHE_DIR") is None
    with pytest.raises(KeyError):
        special_variable("HOME")


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("none", None), ("main", "main"), ("123", "123"), ("no", "no"), ("1e3", "1e3")]
)
def test_text_fields_take_text_literally(text, value):
    assert configure({}, environment={"QUIRE_MODEL__REVISION": text}).config.revision == value


@pytest.mark.parametrize(
    ("content", "cause", "remedy"),
    [
        ("engine: {max_model_length: 3}", "engine.max_model_length", "engine.max_model_len"),
        ("engine: {kv_cache: {blocksize: 3}}", "engine.kv_cache.blocksize", "engine.kv_cache.block_size"),
        ("engine: {seed: -1}", "seed is -1", ""),
        ("engine: 3", "engine", ""),
        ("[1, 2]", "mapping of sections", "config init"),
        ("a: [", "not valid", ""),
    ],
)
def test_errors_in_a_file_name_file_and_key(tmp_path, content, cause, remedy):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        configure({}, file=path, environment={})
    assert cause in caught.value.message
    assert str(path) in caught.value.message
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_file(tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_file(tmp_path / "empty.yaml") == {}
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not valid"):
        read_file(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("QUIRE_ENGINE__MAX_MODEL_LEM", "'QUIRE_ENGINE__MAX_MODEL_LEN'"),
        ("QUIRE_DEBUG", "config init"),
        ("QUIRE_ENGINE__SEED__X", "did you mean"),
    ],
)
def test_an_unknown_variable_is_an_error(variable, remedy):
    with pytest.raises(ConfigError, match=variable) as caught:
        configure({}, environment={variable: "1"})
    assert remedy in caught.value.remedy


def test_a_bad_value_names_its_source():
    with pytest.raises(ConfigError, match=r"^environment: max_num_seqs is 'many'; it must be an integer from 1"):
        configure({}, environment={"QUIRE_ENGINE__MAX_NUM_SEQS": "many"})
    with pytest.raises(ConfigError, match=r"^max_num_seqs is 0; it must be an integer from 1 to 4,096"):
        configure({"max_num_seqs": 0}, environment={})


def test_a_bad_suggestion_of_a_plugin_is_left_out():
    said = configure({}, environment={})
    complaints = []
    suggested = {"seed": (-1, "acme"), "block_size": (32, "acme"), "sede": (1, "other")}
    taken = with_defaults(said, suggested, lambda plugin, problem: complaints.append((plugin, problem)))
    assert taken.config.block_size == 32
    assert taken.config.seed == 0
    assert taken.origins == {"block_size": "plugin acme"}
    assert [plugin for plugin, _ in complaints] == ["acme", "other"]
    assert "seed is -1" in complaints[0][1]
    with pytest.raises(PluginError, match="'acme'"):
        with_defaults(said, suggested)
