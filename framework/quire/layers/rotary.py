"""Rotary embedding tables: default, linear, llama3, yarn and longrope frequencies, as transformers defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.errors import UnsupportedModel

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""Scalings, and what each needs. `dynamic` is not among them: there a key's rotation changes as its request grows."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings of one kind of layer.

    Attributes:
        head_dim: size of a head. rotary_dim: how many of its elements turn.
        theta: base of the frequencies.
        parameters: the checkpoint's `rope_parameters` (or older `rope_scaling`).
        max_positions: positions that the checkpoint was made for.
        original_positions: positions before any scaling was applied.

    Raises UnsupportedModel for an unknown scaling, or one whose parameters are missing or wrong.
    """

    head_dim: int
    rotary_dim: int
    theta: float
    parameters: Mapping[str, Any]
    max_positions: int
    original_positions: int

    def __post_init__(self) -> None:
        if self.kind not in PARAMETERS:
            raise UnsupportedModel(f"config.json has rope type {self.kind!r}; known are {sorted(PARAMETERS)}")
        for name in PARAMETERS[self.kind]:
            value = self.parameters.get(name)
            if name.endswith("_factor") and self.kind == "longrope":
                fits = isinstance(value, list) and len(value) == self.rotary_dim // 2 and all(map(_positive, value))
                wanted = f"a list of {self.rotary_dim // 2} positive numbers"
            else:
                fits, wanted = _positive(value), "a positive number"
            if not fits:
                raise UnsupportedModel(f"config.json's rope type {self.kind!r} has {name!r} = {value!r}; not {wanted}")

    @property
    def kind(self) -> str:
        """Name of the scaling."""
        return str(self.parameters.get("rope_type") or self.parameters.get("type") or "default")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


class Rotary:
    """cos and sin, float32 [max_model_len, rotary_dim/2], made once."""

    def __init__(self, config: RopeConfig, max_model_len: int, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(config, max_model_len)
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
        self._cos = (angles.cos() * factor).to(device)
        self._sin = (angles.sin() * factor).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, rotary_dim/2] of int64 positions [T]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def inverse_frequencies(config: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """(float32 [rotary_dim/2], factor on cos and sin)."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    plain = 1.0 / config.theta**exponents
    scaling, kind = config.parameters, config.kind
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, config), 1.0
    if kind == "yarn":
        return _yarn(plain, config)
    return _longrope(exponents, config, max_model_len)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are slowed down by `factor`, short ones kept, those between interpolated."""
    scaling = config.parameters
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = config.original_positions
    wavelengths = 2 * math.pi / plain
    share = ((original / wavelengths) - low) / (high - low)
    blended = (1 - share) * plain / factor + share * plain
    slowed = torch.where(wavelengths > original / low, plain / factor, plain)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, slowed)


def _yarn(plain: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023)."""
    scaling = config.parameters
    factor = float(scaling["factor"])
    original = config.original_positions
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def dimension(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return config.rotary_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    steps = torch.arange(config.rotary_dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_factor(scaling, factor)


def _yarn_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(float(scaling["mscale"])) / scale(float(scaling["mscale_all_dim"]))
    return scale(1.0)


def _longrope(exponents: Tensor, config: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024). One set of factors serves the whole engine: the long one if requests may pass
    the original length, so that a request's KV does not change its meaning as it grows."""
    scaling = config.parameters
    original = config.original_positions
    chosen = scaling["long_factor"] if max_model_len > original else scaling["short_factor"]
    stretched = torch.tensor(chosen, dtype=torch.float32) * config.theta**exponents
    factor = float(scaling.get("factor") or config.max_positions / original)
    if scaling.get("attention_factor") is not None:
        attention = float(scaling["attention_factor"])
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / stretched, attention
