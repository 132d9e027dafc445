"""Decides every `auto` once: `EngineConfig`, plugins and checkpoint in, `ResolvedConfig` out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from quire.config import Configured, EngineConfig
from quire.contract.attention import AttentionBackend
from quire.contract.device import Device, DeviceInit
from quire.contract.model import ModelSpec
from quire.errors import ConfigError, UnsupportedModel
from quire.host.suggest import suggest
from quire.loader.checkpoint import Checkpoint
from quire.registry import AUTO, Candidate, Check, PluginHost, Selection

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILT_IN_PROCESSORS = ("token_filter", "logit_bias", "min_tokens", "penalties")

POINT_OF_FIELD = {
    "attention_backend": "attention",
    "kv_allocator": "kv_allocator",
    "scheduler": "scheduler",
    "scheduler_policy": "scheduler_policy",
    "sampler": "sampler",
    "executor": "executor",
}
"""Fields that name the provider of a point."""

OP_DEFAULT = "default"
"""The key of `ops` that stands for all kinds that are not named."""

SECRET_WORDS = ("key", "token", "secret", "password")


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What will run. Values are final; `selected` says which provider serves each point, and why.

    Attributes:
        config: what the user said. origins: field -> where its value came from.
        checkpoint: the model's files. spec: its architecture. model_config: its config, as read by the spec.
        device: the device in use. dtype: compute dtype.
        max_model_len, max_num_seqs, max_num_batched_tokens, block_size: as in `EngineConfig`, decided.
        selected: extension point -> choice, for points with one provider in use.
        processors: the logits processors, in the order in which they run.
        op_sets: the op sets that run on the device, in the order in which they are asked.
        sinks: the metrics sinks.
        quantization: the quantization method, or None.
    """

    config: EngineConfig
    origins: Mapping[str, str]
    checkpoint: Checkpoint
    spec: ModelSpec
    model_config: Any
    device: Device
    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    selected: Mapping[str, Selection]
    processors: tuple[Selection, ...]
    op_sets: tuple[Selection, ...]
    sinks: tuple[Selection, ...]
    quantization: Selection | None

    def to_dict(self) -> dict[str, Any]:
        """Printable values, decided ones in place of `auto`; secrets in plugins' options are masked."""
        values = self.config.model_dump(mode="json")
        decided = {name: getattr(self, name) for name in values if name in {item.name for item in fields(self)}}
        chosen = {name: self.selected[point].provider.name for name, point in POINT_OF_FIELD.items()}
        special = {
            "model": self.checkpoint.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.selected["device"].provider.name,
            "quantization": self.quantization.provider.name if self.quantization else None,
            "plugin_options": redacted(values["plugin_options"]),
        }
        return values | decided | chosen | special


def resolve(configured: Configured, host: PluginHost, checkpoint: Checkpoint) -> ResolvedConfig:
    """Decide everything. Raises ConfigError or UnsupportedModel with the reason and a remedy."""
    config = configured.config
    host.check_option_names(config.plugin_options)
    model = select_model(host, checkpoint.config)
    spec: ModelSpec = model.target
    model_config = spec.config_from_hf(checkpoint.config)
    device_choice, device = select_device(config, host)
    device_type = device.torch_device().type
    dtype = _dtype(config, checkpoint, device)
    check = attention_check(spec, model_config, dtype, device_type, config)
    selected = {"device": device_choice, "model": model}
    for name, point in POINT_OF_FIELD.items():
        extra = check if point == "attention" else None
        selected[point] = host.select(point, getattr(config, name), device_type=device_type, check=extra)
    if config.output_parser != AUTO:
        selected["output_parser"] = host.select("output_parser", config.output_parser)
    names = dict.fromkeys((*BUILT_IN_PROCESSORS, *config.logits_processors))
    resolved = ResolvedConfig(
        config=config,
        origins=configured.origins,
        checkpoint=checkpoint,
        spec=spec,
        model_config=model_config,
        device=device,
        dtype=dtype,
        max_model_len=_max_model_len(config, spec.max_model_len(model_config)),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        selected=selected,
        processors=tuple(host.select("logits_processor", name, device_type=device_type) for name in names),
        op_sets=_op_sets(config, host, device_type),
        sinks=tuple(host.select("metrics_sink", name) for name in dict.fromkeys(config.metrics_sinks)),
        quantization=_quantization(config, host, checkpoint),
    )
    _warn_unused_options(resolved, host)
    return resolved


def select_device(config: EngineConfig, host: PluginHost) -> tuple[Selection, Device]:
    """The device to run on. Raises ConfigError."""
    choice = host.select("device", config.device)
    options = host.options_for(choice.provider, config.plugin_options)
    device: Device = choice.target(DeviceInit(options=options))
    return choice, device


def select_model(host: PluginHost, config: Mapping[str, Any]) -> Selection:
    """The model spec for a checkpoint's config.json: a native one, else a bridge that takes it.

    Raises:
        UnsupportedModel: none fits; says why each does not.
    """
    check = model_check(config)
    try:
        return host.select("model", AUTO, check=check)
    except ConfigError:
        label = ", ".join(_architectures(config)) or "(the config names none)"
        reasons = [
            f"{item.provider.name}: {'; '.join(item.reasons)}"
            for item in host.explain("model", check=check)
            if not any(reason.startswith("serves ") for reason in item.reasons)
        ]
        text = f"no model provider takes the architecture {label}"
        remedy = "`quire plugins explain model` lists what is served; a plugin can add an architecture"
        raise UnsupportedModel(text + (f": {' | '.join(reasons)}" if reasons else ""), remedy=remedy) from None


def model_check(config: Mapping[str, Any]) -> Check:
    """The check that decides whether a model spec serves a checkpoint's config.json."""
    architectures = frozenset(_architectures(config))

    def check(spec: ModelSpec) -> list[str]:
        if spec.architectures and not spec.architectures & architectures:
            return [f"serves {', '.join(sorted(spec.architectures))}"]
        return spec.why_not(config)

    return check


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, (list, tuple)) else []


def explain_point(config: EngineConfig, host: PluginHost, point: str, checkpoint: Checkpoint | None) -> list[Candidate]:
    """Every candidate for a point as `resolve` would judge it, with its reasons.

    Args:
        config: what the user said.
        host: the loaded plugins.
        point: the extension point.
        checkpoint: the model; needed for `attention` and `model`, whose choice depends on it.
    """
    wanted = next((getattr(config, name) for name, known in POINT_OF_FIELD.items() if known == point), AUTO)
    if point == "device":
        return host.explain(point, config.device)
    if point == "model" and checkpoint is not None:
        return host.explain(point, check=model_check(checkpoint.config))
    _, device = select_device(config, host)
    device_type = device.torch_device().type
    if point != "attention" or checkpoint is None:
        return host.explain(point, wanted, device_type=device_type)
    spec: ModelSpec = select_model(host, checkpoint.config).target
    dtype = _dtype(config, checkpoint, device)
    check = attention_check(spec, spec.config_from_hf(checkpoint.config), dtype, device_type, config)
    return host.explain(point, wanted, device_type=device_type, check=check)


def attention_check(
    spec: ModelSpec, model_config: Any, dtype: torch.dtype, device_type: str, config: EngineConfig
) -> Check:
    """The check that decides whether an attention backend can serve a model's layers."""
    layers = spec.attention_layers(model_config)

    def check(backend: type[AttentionBackend]) -> list[str]:
        reasons = dict.fromkeys(
            reason for layer in layers for reason in backend.supports(layer, dtype, device_type, config.block_size)
        )
        if config.deterministic and not backend.caps.deterministic:
            reasons["it does not declare deterministic results"] = None
        return list(reasons)

    return check


def redacted(value: Any) -> Any:
    """The value with everything under a key that sounds secret masked."""
    if isinstance(value, Mapping):
        return {
            key: "***" if any(word in str(key).lower() for word in SECRET_WORDS) and item else redacted(item)
            for key, item in value.items()
        }
    return [redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _dtype(config: EngineConfig, checkpoint: Checkpoint, device: Device) -> torch.dtype:
    allowed = device.dtypes()
    if config.dtype == AUTO:
        stored = DTYPES.get(checkpoint.dtype_name)
        return stored if stored is not None and stored in allowed else allowed[0]
    dtype = DTYPES[config.dtype]
    if dtype not in allowed:
        names = [str(item).removeprefix("torch.") for item in allowed]
        raise ConfigError(f"dtype is {config.dtype!r}, which does not run on this device", remedy=f"use one of {names}")
    return dtype


def _max_model_len(config: EngineConfig, longest: int) -> int:
    if config.max_model_len == "auto":
        return longest
    if config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}; this checkpoint allows at most {longest:,}",
            remedy="lower it, or leave it at auto",
        )
    return config.max_model_len


def _op_sets(config: EngineConfig, host: PluginHost, device_type: str) -> tuple[Selection, ...]:
    """All op sets that run on the device, highest priority first; those that `ops` names must be among them."""
    fitting = [item for item in host.explain("op", device_type=device_type) if not item.reasons]
    usable = [host.select("op", f"{item.plugin}:{item.provider.name}", device_type=device_type) for item in fitting]
    known = {kind for choice in usable for kind in choice.target.kinds} | {OP_DEFAULT}
    for kind, name in config.ops.items():
        if kind not in known:
            raise ConfigError(f"ops.{kind}: there is no such kind of operation", remedy=suggest(kind, known))
        wanted = host.select("op", name, device_type=device_type)
        if kind != OP_DEFAULT and kind not in wanted.target.kinds:
            raise ConfigError(f"ops.{kind} is {name!r}, which serves {', '.join(sorted(wanted.target.kinds))} only")
    return tuple(usable)


def _quantization(config: EngineConfig, host: PluginHost, checkpoint: Checkpoint) -> Selection | None:
    stored = checkpoint.quantization_config.get("quant_method")
    if config.quantization is not None:
        choice = host.select("quantization", config.quantization)
        names = choice.target.checkpoint_names
        if (stored in names) if stored else not names:
            return choice
        made = f"is quantized by {stored!r}" if stored else "is not quantized"
        raise ConfigError(
            f"quantization is {config.quantization!r}, but the checkpoint {made}",
            remedy="leave quantization out, and the checkpoint's own method is used",
        )
    if stored is None:
        return None

    def check(method: Any) -> list[str]:
        return [] if stored in method.checkpoint_names else [f"does not read {stored!r}"]

    try:
        return host.select("quantization", AUTO, check=check)
    except ConfigError as error:
        raise UnsupportedModel(f"the checkpoint is quantized by {stored!r}: {error.message}") from None


def _warn_unused_options(resolved: ResolvedConfig, host: PluginHost) -> None:
    """Options of a provider that is not in use are valid, yet most likely not what the user meant."""
    choices = [*resolved.selected.values(), *resolved.processors, *resolved.op_sets, *resolved.sinks]
    if resolved.quantization is not None:
        choices.append(resolved.quantization)
    used = {choice.name for choice in choices}
    if resolved.config.output_parser == AUTO:
        used |= {f"{plugin}:{provider.name}" for provider, plugin in host.providers("output_parser")}
    for key in resolved.config.plugin_options:
        provider, plugin = host.owner_of_options(key)
        if f"{plugin}:{provider.name}" not in used:
            logger.warning("plugin_options.%s is given, but %s %r is not in use", key, provider.point, provider.name)
