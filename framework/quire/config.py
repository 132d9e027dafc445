"""What the user said: `EngineConfig`, and where each value came from.

The attributes are flat, with vLLM's names where it has one; each field also says where it stands in
a config file, so that file, environment variables and flags are all derived from this one table.
Sources, strongest first: keyword arguments and flags, environment, file, plugins' suggestions, defaults.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quire.config_sections import Sections, foreign_sections, foreign_variables, is_foreign, merge
from quire.config_values import Count, Names, describe, from_text, is_mapping, parse_yaml
from quire.errors import ConfigError, PluginError
from quire.host.suggest import suggest

ENV_PREFIX = "QUIRE_"
SPECIAL_VARIABLES = ("QUIRE_LOG_LEVEL", "QUIRE_PLUGINS", "QUIRE_CACHE_DIR")
"""Level of the program's log, list of allowed plugins, folder of downloaded models and of what plugins compile."""


def at(path: str, default: Any, **bounds: Any) -> Any:
    """A field that stands at `path` in a config file."""
    return Field(default, json_schema_extra={"path": path}, **bounds)


class EngineConfig(BaseModel):
    """What the user said of an engine. Frozen; `resolve` decides every `auto`. Raises ConfigError for a bad value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    model: str | None = at("model.path", None)
    """Folder or Hugging Face id of the checkpoint; null: the bundled quire-tiny."""
    revision: str | None = at("model.revision", None)
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = at("model.dtype", "auto")
    """Compute dtype; auto: the checkpoint's, if the device runs it well."""
    quantization: str | None = at("model.quantization", None)
    """Name of a quantization method; null: the one that the checkpoint names, if any."""
    chat_template: str | None = at("model.chat_template", None)
    """Jinja file that replaces the checkpoint's chat template."""
    chat_template_timeout: Count | None = at("model.chat_template_timeout", None, ge=1, le=3600)
    """Seconds that the chat template may take, in a process of its own that is killed then; null: no limit."""
    device: str = at("engine.device", "auto")
    """Name of a device provider; auto: the one of highest priority that this machine has."""
    max_model_len: Annotated[Count, Field(ge=2, le=1 << 30)] | Literal["auto"] = at("engine.max_model_len", "auto")
    """Most tokens of one request, prompt and output; auto: what the checkpoint allows, as far as memory goes."""
    max_num_seqs: Count = at("engine.max_num_seqs", 64, ge=1, le=4096)
    """Most requests that run at once."""
    max_num_batched_tokens: Count = at("engine.max_num_batched_tokens", 2048, ge=1, le=1 << 20)
    """Most tokens of one step; a longer prompt is computed in pieces."""
    async_scheduling: bool | Literal["auto"] = at("engine.async_scheduling", "auto")
    """Launch a step while the one before it runs, with the same outputs; auto: if the device runs beside the host."""
    seed: Count = at("engine.seed", 0, ge=0, le=2**63 - 1)
    """Seed of requests that bring none."""
    deterministic: bool = at("engine.deterministic", False)
    """A request's tokens do not depend on what else is in the batch; slower."""
    process: bool = at("engine.process", False)
    """Run the engine in a process of its own, which is restarted if it dies; `quire serve` does."""
    step_timeout: Count = at("engine.step_timeout", 300, ge=1, le=86_400)
    """With process: seconds after which a step that has not ended counts as hung, and the process is restarted."""
    block_size: Count = at("engine.kv_cache.block_size", 16, ge=1, le=1024)
    """Tokens per KV block."""
    kv_cache_dtype: Literal["auto", "fp8_e4m3", "int8"] = at("engine.kv_cache.dtype", "auto")
    """Dtype of keys and values in the cache; auto: the compute dtype; fp8_e4m3, int8: 8 bits, less exact; int8 has a
    scale for each token and head."""
    num_kv_blocks: Annotated[Count, Field(ge=2, le=1 << 31)] | None = at("engine.kv_cache.num_blocks", None)
    """Blocks in the KV pool; null: as kv_cache_memory says."""
    kv_cache_memory: Annotated[Count, Field(ge=1 << 10, le=1 << 50)] | Literal["auto"] = at(
        "engine.kv_cache.memory", "auto"
    )
    """Bytes for the KV pool; auto: what max_num_seqs full-length requests need, at most half of the free memory
    (of a GPU's, all that its margin leaves)."""
    enable_prefix_caching: bool = at("engine.kv_cache.prefix_caching", True)
    """Requests that begin alike share the KV of their beginning."""
    quant_kernel: str | None = at("quant.kernel", None)
    """Name of the op set that multiplies by quantized weights, as `quant_linear` in plugins.ops; null: the first that
    serves a layer."""
    attention_backend: str = at("plugins.attention", "auto")
    """Name of an attention provider."""
    kv_allocator: str = at("plugins.kv_allocator", "auto")
    """Name of a KV allocator."""
    scheduler: str = at("plugins.scheduler", "auto")
    """Name of a scheduler."""
    scheduler_policy: str = at("plugins.scheduler_policy", "auto")
    """Name of a scheduler policy."""
    sampler: str = at("plugins.sampler", "auto")
    """Name of a sampler."""
    executor: str = at("plugins.executor", "auto")
    """Name of an executor."""
    output_parser: str = at("plugins.output_parser", "auto")
    """Name of an output parser; auto: by the markers in the chat template."""
    ops: Mapping[str, str] = at("plugins.ops", {})
    """Kind of operation -> name of the op set to use; `default` stands for all kinds that are not named."""
    logits_processors: Names = at("plugins.logits_processors", ())
    """Further logits processors, beside the built-in ones."""
    metrics_sinks: Names = at("plugins.metrics_sinks", ())
    """Metrics sinks to feed."""
    allowed_plugins: Names | None = at("plugins.allowed", None)
    """If given, only these plugins are loaded beside the core."""
    blocked_plugins: Names = at("plugins.blocked", ())
    """Plugins that are not loaded."""
    plugin_options: Mapping[str, Mapping[str, Any]] = at("plugins.options", {})
    """Provider name -> its options."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _config_error(error) from None

    @model_validator(mode="after")
    def _one_pool_size(self) -> Self:
        if self.num_kv_blocks is not None and self.kv_cache_memory != "auto":
            raise ValueError("num_kv_blocks and kv_cache_memory both size the KV pool; give one of them")
        return self

    @model_validator(mode="after")
    def _one_quant_kernel(self) -> Self:
        named = self.ops.get("quant_linear")
        if None not in (named, self.quant_kernel) and named != self.quant_kernel:
            raise ValueError(
                f"quant_kernel is {self.quant_kernel!r} and ops.quant_linear is {named!r}; "
                "both name what multiplies by quantized weights: give one of them"
            )
        return self

    def named_ops(self) -> Mapping[str, str]:
        """Kind of operation -> name of the op set that was asked for."""
        return self.ops if self.quant_kernel is None else {**self.ops, "quant_linear": self.quant_kernel}


@dataclass(frozen=True, slots=True)
class Configured:
    """A configuration, and where it came from.

    Attributes:
        config: the values. origins: field -> source, for fields that were not left open.
        sections: what was said in sections that plugins own, read by `PluginHost.section`.
    """

    config: EngineConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    sections: Sections = field(default_factory=dict)


def field_path(name: str) -> str:
    """Where a field stands in a config file, such as `engine.kv_cache.block_size`."""
    extra = EngineConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["path"])


def core_sections() -> frozenset[str]:
    """Names of the sections that hold the core's fields; all others are plugins'."""
    return frozenset(path.split(".")[0] for path in field_paths())


def field_paths() -> dict[str, str]:
    """File path -> field name."""
    return {field_path(name): name for name in EngineConfig.model_fields}


def environment_variable(name: str) -> str:
    """The variable that sets a field, such as `QUIRE_ENGINE__KV_CACHE__BLOCK_SIZE`."""
    return ENV_PREFIX + field_path(name).replace(".", "__").upper()


def make_config(values: Mapping[str, Any]) -> EngineConfig:
    """Validate flat values. Raises ConfigError naming field, value and what is allowed."""
    return EngineConfig(**values)


def configure(
    options: Mapping[str, Any],
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    origin: str = "argument",
) -> Configured:
    """Merge options over environment over file over defaults.

    Args:
        options: flat values of the strongest source, which `origin` names.
        file: YAML or TOML file.
        environment: None: the process's.

    Raises:
        ConfigError: an unknown key or a value that is not allowed; says where it came from.
    """
    variables = os.environ if environment is None else environment
    tree = read_tree(file) if file is not None else {}
    sources = (
        (str(file), _flatten(tree, str(file))),
        ("environment", from_env(variables)),
        (origin, dict(options)),
    )
    core = core_sections()
    sections = merge(foreign_sections(tree, core), foreign_variables(variables, ENV_PREFIX, core))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, values in sources:
        try:
            make_config(values)
        except ConfigError as error:
            where = f"{source}: " if source != "argument" else ""
            raise ConfigError(where + error.message, remedy=error.remedy) from None
        merged.update(values)
        origins.update(dict.fromkeys(values, source))
    return Configured(make_config(merged), origins, sections)


def with_defaults(
    configured: Configured,
    suggested: Mapping[str, tuple[Any, str]],
    complain: Callable[[str, str], None] | None = None,
) -> Configured:
    """Fill fields that the user left open with plugins' suggestions.

    Args:
        configured: what the user said, which wins.
        suggested: field -> (value, plugin).
        complain: told (plugin, problem) of a suggestion that cannot be taken, which is then left out;
            None: such a suggestion is a PluginError.
    """
    values = {name: getattr(configured.config, name) for name in configured.origins}
    origins = dict(configured.origins)
    for name, (value, plugin) in suggested.items():
        if name in configured.origins:
            continue
        try:
            make_config(values | {name: value})
        except ConfigError as error:
            problem = f"quire_config_defaults suggests what cannot be: {error.message}"
            if complain is None:
                raise PluginError(f"plugin {plugin!r}: {problem}") from None
            complain(plugin, problem)
            continue
        values[name], origins[name] = value, f"plugin {plugin}"
    return Configured(make_config(values), origins, configured.sections)


def preset(configured: Configured, values: Mapping[str, Any], origin: str) -> Configured:
    """Fill fields that the user left open with values that `origin` wants by itself."""
    said = {name: getattr(configured.config, name) for name in configured.origins}
    left_open = {name: value for name, value in values.items() if name not in said}
    origins = {**configured.origins, **dict.fromkeys(left_open, origin)}
    return Configured(make_config(said | left_open), origins, configured.sections)


def read_file(path: Path) -> dict[str, Any]:
    """Flat values of the core's sections of a YAML or TOML file. Raises ConfigError for an unknown key."""
    return _flatten(read_tree(path), str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML or TOML file. Raises ConfigError if it is neither."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the configuration {path} is not valid: {' '.join(str(error).split())}",
            remedy="look at the line that it names; YAML is indented by spaces, never tabs",
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration {path} must be a mapping of sections", remedy="see `quire config init`")
    return tree


def from_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Flat values of the `QUIRE_` variables.

    A key of a mapping can be set alone, as in `QUIRE_PLUGINS__OPS__DEFAULT=torch`; it is read in lower
    case. `QUIRE_PLUGINS` is the list of allowed plugins. Raises ConfigError for an unknown variable.
    """
    fields = {environment_variable(name): name for name in EngineConfig.model_fields}
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        text = environment[variable]
        if not variable.startswith(ENV_PREFIX) or (variable in SPECIAL_VARIABLES and variable != "QUIRE_PLUGINS"):
            continue
        if is_foreign(variable, ENV_PREFIX, core_sections()):
            continue
        if variable == "QUIRE_PLUGINS":
            values.setdefault("allowed_plugins", text)
        elif name := fields.get(variable):
            values[name] = from_text(EngineConfig.model_fields[name], text)
        elif not _set_key(values, fields, variable, text):
            remedy = suggest(variable, [*fields, *SPECIAL_VARIABLES]) if "__" in variable else ""
            remedy = remedy if remedy.startswith("did") else "`quire config init` names the variables"
            raise ConfigError(f"the environment variable {variable} sets nothing", remedy=remedy)
    return values


def _set_key(values: dict[str, Any], fields: Mapping[str, str], variable: str, text: str) -> bool:
    """Set one key of a mapping field; False if the variable names none."""
    for prefix, name in fields.items():
        if not variable.startswith(f"{prefix}__") or not is_mapping(EngineConfig.model_fields[name]):
            continue
        *parents, last = variable.removeprefix(f"{prefix}__").lower().split("__")
        node = values[name] = dict(values.get(name) or {})
        for key in parents:
            node[key] = dict(node.get(key) or {})
            node = node[key]
        node[last] = parse_yaml(text)
        return True
    return False


def special_variable(name: str) -> str | None:
    """One of SPECIAL_VARIABLES, or None if it is not set or empty."""
    if name not in SPECIAL_VARIABLES:
        raise KeyError(name)
    return os.environ.get(name) or None


def child_environment() -> dict[str, str]:
    """Variables for an engine's own process: this one's, and that torch's threads sleep while they have nothing to do.

    They would look for work for milliseconds, on processors that other threads and the server could use.
    """
    return {"OMP_WAIT_POLICY": "passive"} | os.environ


def _flatten(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    paths = field_paths()
    values: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if path in paths:
                values[paths[path]] = value
            elif isinstance(value, Mapping) and any(known.startswith(f"{path}.") for known in paths):
                walk(value, f"{path}.")
            elif isinstance(value, Mapping) and not prefix:
                continue  # a section that a plugin may own
            else:
                raise ConfigError(f"{origin}: unknown key {path!r}", remedy=suggest(path, paths))

    walk(tree, "")
    return values


def _config_error(error: ValidationError) -> ConfigError:
    """The first problem as one sentence that names field, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{name!r} is not a configuration field", remedy=suggest(name, EngineConfig.model_fields))
    if not name:
        return ConfigError(first["msg"].removeprefix("Value error, "))
    value = first["input"]
    return ConfigError(f"{name} is {value!r}; it must be {describe(EngineConfig.model_fields[name])}")
