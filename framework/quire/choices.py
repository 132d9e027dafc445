"""The choices that depend on the model: device, architecture, dtype and attention backend, each with its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.config import EngineConfig
from quire.contract.attention import AttentionBackend
from quire.contract.device import Device, DeviceInit
from quire.contract.model import ModelSpec
from quire.contract.quant import QuantMethod
from quire.errors import ConfigError, UnsupportedModel
from quire.loader.checkpoint import Checkpoint
from quire.registry import AUTO, Candidate, Check, PluginHost, Selection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

POINT_OF_FIELD = {
    "attention_backend": "attention",
    "kv_allocator": "kv_allocator",
    "scheduler": "scheduler",
    "scheduler_policy": "scheduler_policy",
    "sampler": "sampler",
    "executor": "executor",
}
"""Fields that name the provider of a point."""


def select_device(config: EngineConfig, host: PluginHost) -> tuple[Selection, Device]:
    """The device to run on. Raises ConfigError."""
    choice = host.select("device", config.device)
    options = host.options_for(choice.provider, config.plugin_options)
    device: Device = choice.make(DeviceInit(options=options))
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


def attention_check(
    spec: ModelSpec, model_config: Any, dtype: torch.dtype, device_type: str, config: EngineConfig
) -> Check:
    """The check that decides whether an attention backend can serve a model's layers."""
    layers = spec.attention_layers(model_config)

    def check(backend: type[AttentionBackend]) -> list[str]:
        reasons = dict.fromkeys(
            reason for layer in layers for reason in backend.supports(layer, dtype, device_type, config.block_size)
        )
        if config.kv_cache_dtype not in backend.caps.kv_dtypes:
            known = sorted(backend.caps.kv_dtypes)
            reasons[f"KV cache dtype {config.kv_cache_dtype!r} is not one of {known}"] = None
        if config.deterministic and not backend.caps.deterministic:
            reasons["it does not declare deterministic results"] = None
        return list(reasons)

    return check


def choose_dtype(config: EngineConfig, checkpoint: Checkpoint, device: Device) -> torch.dtype:
    """The compute dtype: as said, else the checkpoint's if the device runs it well, else the device's best."""
    allowed = device.dtypes()
    if config.dtype == AUTO:
        stored = DTYPES.get(checkpoint.dtype_name)
        return stored if stored is not None and stored in allowed else allowed[0]
    dtype = DTYPES[config.dtype]
    if dtype not in allowed:
        names = [str(item).removeprefix("torch.") for item in allowed]
        raise ConfigError(f"dtype is {config.dtype!r}, which does not run on this device", remedy=f"use one of {names}")
    return dtype


def quantization_check(stored: str | None, named: bool) -> Check:
    """The check that decides whether a method serves a checkpoint, of which `stored` is the format of its weights."""

    def check(method: type[QuantMethod]) -> list[str]:
        if stored is not None:
            return [] if stored in method.checkpoint_names else [f"does not read {stored!r}"]
        if method.checkpoint_names:
            return [f"reads {', '.join(sorted(method.checkpoint_names))}; the checkpoint is not quantized"]
        return [] if named else ["the checkpoint is not quantized, and nobody asked for it"]

    return check


def explain_point(config: EngineConfig, host: PluginHost, point: str, checkpoint: Checkpoint | None) -> list[Candidate]:
    """Every candidate for a point as `resolve` would judge it, with its reasons.

    Args:
        config: what the user said.
        host: the loaded plugins.
        point: the extension point.
        checkpoint: the model; needed for `attention`, `model` and `quantization`, whose choice depends on it.
    """
    wanted = next((getattr(config, name) for name, known in POINT_OF_FIELD.items() if known == point), AUTO)
    if point == "device":
        return host.explain(point, config.device)
    if point == "quantization" and checkpoint is not None:
        named = config.quantization
        return host.explain(point, named or AUTO, check=quantization_check(checkpoint.quant_method, named is not None))
    if point == "model" and checkpoint is not None:
        return host.explain(point, check=model_check(checkpoint.config))
    _, device = select_device(config, host)
    device_type = device.torch_device().type
    if point != "attention" or checkpoint is None:
        return host.explain(point, wanted, device_type=device_type)
    spec: ModelSpec = select_model(host, checkpoint.config).target
    dtype = choose_dtype(config, checkpoint, device)
    check = attention_check(spec, spec.config_from_hf(checkpoint.config), dtype, device_type, config)
    return host.explain(point, wanted, device_type=device_type, check=check)
