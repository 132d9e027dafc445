"""Moves a check's tensors to the device under test; problems are made on the CPU, the same for every device."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def placed(value: T, device: str | torch.device) -> T:
    """A copy of a tensor, dataclass or sequence on the device; fields named `*_host` stay where they are."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, list | tuple):
        moved = type(value)(placed(item, device) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if not field.name.endswith("_host")]
        moved = dataclasses.replace(value, **{name: placed(getattr(value, name), device) for name in names})
    return moved  # type: ignore[no-any-return]
