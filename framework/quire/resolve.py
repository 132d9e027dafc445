"""Decides every `auto` once: `EngineConfig`, plugins and checkpoint in, `ResolvedConfig` out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from quire.choices import POINT_OF_FIELD, attention_check, choose_dtype, select_device, select_model
from quire.config import Configured, EngineConfig
from quire.contract.attention import kv_cache_dtype
from quire.contract.device import Device
from quire.contract.model import ModelSpec
from quire.errors import ConfigError, UnsupportedModel
from quire.host.suggest import suggest
from quire.loader.checkpoint import Checkpoint
from quire.registry import AUTO, PluginHost, Selection

logger = logging.getLogger(__name__)

BUILT_IN_PROCESSORS = ("token_filter", "logit_bias", "min_tokens", "penalties")

OP_DEFAULT = "default"
"""The key of `ops` that stands for all kinds that are not named."""

CODES = (torch.int32, torch.float8_e4m3fn)
"""Dtypes of matrices that hold packed codes or eight bits of a float, never a plain weight."""

SECRET_WORDS = ("key", "token", "secret", "password")


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What will run. Values are final; `selected` says which provider serves each point, and why.

    Attributes:
        config: what the user said. origins: field -> where its value came from.
        checkpoint: the model's files. spec: its architecture. model_config: its config, as read by the spec.
        device: the device in use. dtype: compute dtype.
        max_model_len, max_num_seqs, max_num_batched_tokens, block_size, async_scheduling: as in `EngineConfig`,
            decided.
        selected: extension point -> choice, for points with one provider in use.
        processors: the logits processors, in the order in which they run.
        op_sets: the op sets that run on the device, in the order in which they are asked.
        ops: kind of operation, or `default` -> `plugin:name` of the op set that the user wants for it.
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
    async_scheduling: bool
    selected: Mapping[str, Selection]
    processors: tuple[Selection, ...]
    op_sets: tuple[Selection, ...]
    ops: Mapping[str, str]
    sinks: tuple[Selection, ...]
    quantization: Selection | None

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the KV cache's elements."""
        return kv_cache_dtype(self.config.kv_cache_dtype, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Printable values, decided ones in place of `auto`; secrets in plugins' options are masked."""
        values = self.config.model_dump(mode="json")
        decided = {name: getattr(self, name) for name in values if name in {item.name for item in fields(self)}}
        chosen = {name: self.selected[point].provider.name for name, point in POINT_OF_FIELD.items()}
        dtype, cached = str(self.dtype).removeprefix("torch."), self.config.kv_cache_dtype
        special = {
            "model": self.checkpoint.name,
            "dtype": dtype,
            "kv_cache_dtype": dtype if cached == AUTO else cached,
            "device": self.selected["device"].provider.name,
            "ops": dict(self.config.named_ops()),
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
    dtype = choose_dtype(config, checkpoint, device)
    check = attention_check(spec, model_config, dtype, device_type, config)
    selected = {"device": device_choice, "model": model}
    for name, point in POINT_OF_FIELD.items():
        extra = check if point == "attention" else None
        selected[point] = host.select(point, getattr(config, name), device_type=device_type, check=extra)
    if config.output_parser != AUTO:
        selected["output_parser"] = host.select("output_parser", config.output_parser)
    op_sets = _op_sets(host, device_type)
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
        async_scheduling=_async_scheduling(config, device, selected["executor"]),
        selected=selected,
        processors=tuple(host.select("logits_processor", name, device_type=device_type) for name in names),
        op_sets=op_sets,
        ops=_op_overrides(config, host, op_sets, device_type),
        sinks=tuple(host.select("metrics_sink", name) for name in dict.fromkeys(config.metrics_sinks)),
        quantization=_quantization(config, host, checkpoint),
    )
    _warn_unused_options(resolved, host)
    return resolved


def redacted(value: Any) -> Any:
    """The value with everything under a key that sounds secret masked."""
    if isinstance(value, Mapping):
        return {
            key: "***" if any(word in str(key).lower() for word in SECRET_WORDS) and item else redacted(item)
            for key, item in value.items()
        }
    return [redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _max_model_len(config: EngineConfig, longest: int) -> int:
    if config.max_model_len == "auto":
        return longest
    if config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}; this checkpoint allows at most {longest:,}",
            remedy="lower it, or leave it at auto",
        )
    return config.max_model_len


def _async_scheduling(config: EngineConfig, device: Device, executor: Selection) -> bool:
    can_overlap = executor.target.max_in_flight >= 2
    if config.async_scheduling == "auto":
        return device.runs_async and can_overlap
    if config.async_scheduling and not can_overlap:
        raise ConfigError(
            f"async_scheduling is on, but the executor {executor.provider.name!r} takes one step at a time",
            remedy="leave async_scheduling at auto",
        )
    return config.async_scheduling


def _op_sets(host: PluginHost, device_type: str) -> tuple[Selection, ...]:
    """All op sets that run on the device, highest priority first."""
    fitting = [item for item in host.explain("op", device_type=device_type) if not item.reasons]
    names = [f"{item.plugin}:{item.provider.name}" for item in fitting]
    return tuple(host.select("op", name, device_type=device_type) for name in names)


def _op_overrides(
    config: EngineConfig, host: PluginHost, op_sets: Sequence[Selection], device_type: str
) -> dict[str, str]:
    """What `ops` says, with unique names. Raises ConfigError for an op set that cannot serve what it is named for."""
    known = {kind for choice in op_sets for kind in choice.target.kinds} | {OP_DEFAULT}
    overrides = {}
    for kind, name in config.named_ops().items():
        if kind not in known:
            raise ConfigError(f"ops.{kind}: there is no such kind of operation", remedy=suggest(kind, known))
        wanted = host.select("op", name, device_type=device_type)
        if kind != OP_DEFAULT and kind not in wanted.target.kinds:
            raise ConfigError(f"ops.{kind} is {name!r}, which serves {', '.join(sorted(wanted.target.kinds))} only")
        overrides[kind] = wanted.name
    return overrides


def _quantization(config: EngineConfig, host: PluginHost, checkpoint: Checkpoint) -> Selection | None:
    stored = checkpoint.quant_method
    if stored is None:
        _refuse_codes(checkpoint)
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
    known: set[str] = set()

    def check(method: Any) -> list[str]:
        known.update(method.checkpoint_names)
        return [] if stored in method.checkpoint_names else [f"does not read {stored!r}"]

    try:
        return host.select("quantization", AUTO, check=check)
    except ConfigError as error:
        if stored in known:
            raise UnsupportedModel(f"the checkpoint is quantized by {stored!r}: {error.message}") from None
        raise UnsupportedModel(
            f"the checkpoint is quantized by {stored!r}, which no plugin reads; "
            f"read are {', '.join(sorted(known)) or 'none'}",
            remedy="take one of the model in such a form, or the unquantized one, which `quire quantize` makes smaller",
        ) from None


def _refuse_codes(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel if weights are quantized and nothing says how."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in CODES and len(tensor.shape) == 2:
            raise UnsupportedModel(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, so that the checkpoint is quantized, but "
                "config.json has no quantization_config",
                remedy="fetch config.json, quantize_config.json or quant_config.json of the same model again",
            )


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
