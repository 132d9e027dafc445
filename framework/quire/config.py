"""What the user said: `EngineConfig`, and where each value came from.

The attributes are flat, with vLLM's names where it has one; each field also says where it stands in
a config file, so that file, environment variables and flags are all derived from this one table.
Sources, strongest first: keyword arguments and flags, environment, file, plugins' suggestions, defaults.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quire.errors import ConfigError

ENV_PREFIX = "QUIRE_"
SPECIAL_VARIABLES = ("QUIRE_LOG_LEVEL", "QUIRE_PLUGINS", "QUIRE_CACHE_DIR")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_count(value: Any) -> Any:
    """`8k` -> 8000, `2GiB` -> 2147483648; anything that is not such a text passes through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if match is None:
        return value
    return int(float(match[1]) * _UNITS[match[2] or ""])


Count = Annotated[int, BeforeValidator(parse_count)]


def at(path: str, default: Any, **bounds: Any) -> Any:
    """A field that stands at `path` in a config file."""
    return Field(default, json_schema_extra={"path": path}, **bounds)


class EngineConfig(BaseModel):
    """What the user said of an engine. Frozen; `resolve` decides every `auto`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = at("model.path", None)
    """Folder or Hugging Face id of the checkpoint; None: the bundled quire-tiny."""
    revision: str | None = at("model.revision", None)
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = at("model.dtype", "auto")
    """Compute dtype; auto: the checkpoint's, if the device runs it well."""
    quantization: str | None = at("model.quantization", None)
    """Name of a quantization method; None: the one that the checkpoint names, if any."""
    chat_template: str | None = at("model.chat_template", None)
    """Jinja file that replaces the checkpoint's chat template."""
    device: str = at("engine.device", "auto")
    """Name of a device provider."""
    max_model_len: Count | Literal["auto"] = at("engine.max_model_len", "auto")
    """Most tokens of one request, prompt and output; auto: what the checkpoint allows, as far as memory goes."""
    max_num_seqs: Count = at("engine.max_num_seqs", 64, ge=1, le=4096)
    """Most requests that run at once."""
    max_num_batched_tokens: Count = at("engine.max_num_batched_tokens", 2048, ge=1, le=1 << 20)
    """Most tokens of one step; a longer prompt is computed in pieces."""
    seed: int = at("engine.seed", 0, ge=0, le=2**63 - 1)
    """Seed of requests that bring none."""
    deterministic: bool = at("engine.deterministic", False)
    """A request's tokens do not depend on what else is in the batch; slower."""
    block_size: Count = at("engine.kv_cache.block_size", 16, ge=1, le=1024)
    """Tokens per KV block."""
    num_kv_blocks: Count | None = at("engine.kv_cache.num_blocks", None, ge=2)
    """Blocks in the KV pool; None: as kv_cache_memory says."""
    kv_cache_memory: Count | Literal["auto"] = at("engine.kv_cache.memory", "auto")
    """Bytes for the KV pool; auto: what max_num_seqs full-length requests need, at most half of the free memory."""
    enable_prefix_caching: bool = at("engine.kv_cache.prefix_caching", True)
    """Requests that begin alike share the KV of their beginning."""
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
    """Kind of operation -> name of the op set to use; the key `default` stands for all kinds."""
    logits_processors: tuple[str, ...] = at("plugins.logits_processors", ())
    """Further logits processors, beside the built-in ones."""
    metrics_sinks: tuple[str, ...] = at("plugins.metrics_sinks", ())
    """Metrics sinks to feed."""
    allowed_plugins: tuple[str, ...] | None = at("plugins.allowed", None)
    """If given, only these plugins are loaded beside the core."""
    blocked_plugins: tuple[str, ...] = at("plugins.blocked", ())
    """Plugins that are not loaded."""
    plugin_options: Mapping[str, Mapping[str, Any]] = at("plugins.options", {})
    """Provider name -> its options."""


@dataclass(frozen=True, slots=True)
class Configured:
    """A configuration, and per field where its value came from."""

    config: EngineConfig
    origins: Mapping[str, str] = field(default_factory=dict)


def field_path(name: str) -> str:
    """Where a field stands in a config file, such as `engine.kv_cache.block_size`."""
    extra = EngineConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["path"])


def field_paths() -> dict[str, str]:
    """File path -> field name."""
    return {field_path(name): name for name in EngineConfig.model_fields}


def environment_variable(name: str) -> str:
    """The variable that sets a field, such as `QUIRE_ENGINE__KV_CACHE__BLOCK_SIZE`."""
    return ENV_PREFIX + field_path(name).replace(".", "__").upper()


def make_config(values: Mapping[str, Any]) -> EngineConfig:
    """Validate flat values. Raises ConfigError naming field, value and what is allowed."""
    for name in values:
        if name not in EngineConfig.model_fields:
            raise ConfigError(
                f"{name!r} is not a configuration field", remedy=_suggest(name, EngineConfig.model_fields)
            )
    try:
        return EngineConfig(**values)
    except ValidationError as error:
        raise _config_error(error) from None


def configure(
    options: Mapping[str, Any], *, file: Path | None = None, environment: Mapping[str, str] | None = None
) -> Configured:
    """Merge options over environment over file over defaults."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources = (
        (str(file), read_file(file) if file is not None else {}),
        ("environment", from_env(os.environ if environment is None else environment)),
        ("argument", dict(options)),
    )
    for origin, values in sources:
        merged.update(values)
        origins.update(dict.fromkeys(values, origin))
    return Configured(make_config(merged), origins)


def with_defaults(configured: Configured, suggested: Mapping[str, tuple[Any, str]]) -> Configured:
    """Fill fields that the user left open with plugins' suggestions."""
    fresh = {name: pair for name, pair in suggested.items() if name not in configured.origins}
    if not fresh:
        return configured
    said = {name: getattr(configured.config, name) for name in configured.origins}
    config = make_config(said | {name: value for name, (value, _) in fresh.items()})
    return Configured(
        config, dict(configured.origins) | {name: f"plugin {plugin}" for name, (_, plugin) in fresh.items()}
    )


def read_file(path: Path) -> dict[str, Any]:
    """Flat values of a YAML or TOML file. Raises ConfigError for an unknown key or a file that is neither."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not valid: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration {path} must be a mapping of sections", remedy="see `quire config init`")
    return _flatten(tree, str(path))


def from_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Flat values of the `QUIRE_` variables; the few that configure no engine are left out."""
    names = {environment_variable(name): name for name in EngineConfig.model_fields}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENV_PREFIX) or variable in SPECIAL_VARIABLES:
            continue
        if variable not in names:
            raise ConfigError(
                f"the environment variable {variable} sets nothing",
                remedy=_suggest(variable, [*names, *SPECIAL_VARIABLES]),
            )
        values[names[variable]] = parse_text(text)
    return values


def special_variable(name: str) -> str | None:
    """One of SPECIAL_VARIABLES, or None if it is not set."""
    if name not in SPECIAL_VARIABLES:
        raise KeyError(name)
    return os.environ.get(name)


def parse_text(text: str) -> Any:
    """A value given as text: YAML, so that `true`, `[a, b]` and `{a: b}` mean what they look like."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


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
            else:
                raise ConfigError(f"{origin}: unknown key {path!r}", remedy=_suggest(path, paths))

    walk(tree, "")
    return values


def _config_error(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    text = f"{name} is {first['input']!r}: {message[:1].lower()}{message[1:]}"
    return ConfigError(text, remedy=f"see {field_path(name)!r} in `quire config init`" if name else "")


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else "`quire config schema` lists all fields"
