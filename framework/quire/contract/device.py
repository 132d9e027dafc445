"""Devices: the only place that knows streams, pinned memory, graphs and how much memory there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of the device: in all, and free to this process now."""

    total: int
    free: int


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """What a captured graph is keyed by: padded sizes, and the uniform query length (0: mixed)."""

    uniform_query_len: int
    num_reqs: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DeviceInit:
    """All that a device is constructed from.

    Attributes:
        index: which of several; -1: the default one.
        options: the validated instance of `Provider.options`, or None.
    """

    index: int = -1
    options: Any = None


class GraphRunner(ABC):
    """Runs a step's device work, eagerly or by replaying what was captured for its key."""

    @abstractmethod
    def keys(self) -> Sequence[GraphKey]:
        """Sizes worth padding to; empty: every step runs eagerly at its exact size."""

    @abstractmethod
    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        """Run `work`, or its captured form for `key`; None: eagerly.

        For one key, `work` reads and writes the same addresses every time.
        """


class Device(ABC):
    """One device. Nothing else in Quire asks for memory, streams or graphs."""

    def __init__(self, init: DeviceInit) -> None:
        self.init = init

    @abstractmethod
    def torch_device(self) -> torch.device:
        """The device that tensors are made on."""

    @abstractmethod
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Compute dtypes that run well, best first."""

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """Bytes in all and free."""

    @abstractmethod
    def graph_runner(self) -> GraphRunner:
        """A new runner."""

    @abstractmethod
    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed CPU tensor that copies to the device fast (pinned, where that exists)."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work that was handed to the device has ended."""
