"""Decides every `auto` once: `EngineConfig`, plugins and checkpoint in, `ResolvedConfig` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from quire.config import Configured, EngineConfig
from quire.contract.attention import AttentionBackend
from quire.contract.device import Device, DeviceInit
from quire.contract.model import ModelSpec
from quire.errors import ConfigError
from quire.loader.checkpoint import Checkpoint
from quire.loader.select import select_spec
from quire.registry import AUTO, PluginHost, Selection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILT_IN_PROCESSORS = ("token_filter", "logit_bias", "min_tokens", "penalties")


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
        op_sets: the op sets, in the order in which they are asked.
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
        """Printable values, decided ones in place of `auto`."""
        values = self.config.model_dump()
        decided = {name: getattr(self, name) for name in values if name in {item.name for item in fields(self)}}
        chosen = {name: self.selected[point].provider.name for name, point in POINT_OF_FIELD.items()}
        quantization = self.quantization.provider.name if self.quantization else None
        special = {
            "model": self.checkpoint.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.selected["device"].provider.name,
            "quantization": quantization,
        }
        return values | decided | chosen | special


POINT_OF_FIELD = {
    "attention_backend": "attention",
    "kv_allocator": "kv_allocator",
    "scheduler": "scheduler",
    "scheduler_policy": "scheduler_policy",
    "sampler": "sampler",
    "executor": "executor",
}


def resolve(configured: Configured, host: PluginHost, checkpoint: Checkpoint) -> ResolvedConfig:
    """Decide everything. Raises ConfigError or UnsupportedModel with the reason and a remedy."""
    config = configured.config
    host.check_option_names(config.plugin_options)
    specs = [(provider.name, host.load("model", f"{plugin}:{provider.name}")) for provider, plugin in _models(host)]
    model_name, spec = select_spec(specs, checkpoint.config)
    model_config = spec.config_from_hf(checkpoint.config)
    device_choice = host.select("device", config.device)
    options = host.options_for(device_choice.provider, config.plugin_options)
    device: Device = device_choice.target(DeviceInit(options=options))
    dtype = _dtype(config, checkpoint, device)
    selected = {"device": device_choice, "model": host.select("model", model_name)}
    selected |= _select_parts(config, host, device, dtype, spec, model_config)
    return ResolvedConfig(
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
        processors=tuple(
            host.select("logits_processor", name) for name in (*BUILT_IN_PROCESSORS, *config.logits_processors)
        ),
        op_sets=_op_sets(config, host, device),
        sinks=tuple(host.select("metrics_sink", name) for name in config.metrics_sinks),
        quantization=_quantization(config, host, checkpoint),
    )


def attention_check(layers: Sequence[Any], dtype: torch.dtype, device_type: str, config: EngineConfig) -> Any:
    """The check that decides whether an attention backend can serve a model's layers."""

    def check(backend: type[AttentionBackend]) -> list[str]:
        reasons = dict.fromkeys(
            reason for layer in layers for reason in backend.supports(layer, dtype, device_type, config.block_size)
        )
        if config.deterministic and not backend.caps.deterministic:
            reasons["it does not declare deterministic results"] = None
        return list(reasons)

    return check


def _select_parts(
    config: EngineConfig, host: PluginHost, device: Device, dtype: torch.dtype, spec: ModelSpec, model_config: Any
) -> dict[str, Selection]:
    device_type = device.torch_device().type
    check = attention_check(spec.attention_layers(model_config), dtype, device_type, config)
    chosen = {"attention": host.select("attention", config.attention_backend, device_type=device_type, check=check)}
    for field, point in POINT_OF_FIELD.items():
        if point not in chosen:
            chosen[point] = host.select(point, getattr(config, field), device_type=device_type)
    return chosen


def _models(host: PluginHost) -> list[tuple[Any, str]]:
    return host.providers("model")


def _dtype(config: EngineConfig, checkpoint: Checkpoint, device: Device) -> torch.dtype:
    allowed = device.dtypes()
    if config.dtype != AUTO:
        dtype = DTYPES[config.dtype]
        if dtype not in allowed:
            names = [str(item).removeprefix("torch.") for item in allowed]
            raise ConfigError(f"dtype {config.dtype!r} does not run on this device", remedy=f"use one of {names}")
        return dtype
    stored = DTYPES.get(checkpoint.dtype_name)
    return stored if stored in allowed and stored is not None else allowed[0]


def _max_model_len(config: EngineConfig, longest: int) -> int:
    if config.max_model_len == AUTO:
        return longest
    assert isinstance(config.max_model_len, int)
    if not 2 <= config.max_model_len <= longest:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}; this checkpoint allows 2 to {longest:,}",
            remedy="lower it, or leave it at auto",
        )
    return config.max_model_len


def _op_sets(config: EngineConfig, host: PluginHost, device: Device) -> tuple[Selection, ...]:
    device_type = device.torch_device().type
    usable = []
    for provider, plugin in host.providers("op"):
        try:
            usable.append(host.select("op", f"{plugin}:{provider.name}", device_type=device_type))
        except ConfigError:
            if provider.name in config.ops.values():
                raise
    known = {selection.provider.name for selection in usable}
    for kind, name in config.ops.items():
        if name not in known:
            raise ConfigError(f"ops.{kind} names {name!r}, which is no op set", remedy=f"known are {sorted(known)}")
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

    return host.select("quantization", AUTO, check=check)
