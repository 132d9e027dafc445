"""A device that delivers late, on the CPU: what overlapping steps need is tested with it where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.contract.device import Device, DeviceInit, GraphKey, GraphRunner, HostCopy, MemoryInfo


class DelayedDevice(Device):
    """A CPU that says it runs beside the host.

    A copy to the host reads its tensors only when it is waited for, which is as late as any device may: who
    overwrites them before, or never waits, gets another result.

    Attributes:
        num_started: copies started. num_waited: copies waited for. most_in_flight: the largest difference.
    """

    runs_async: ClassVar[bool] = True

    def __init__(self, init: DeviceInit) -> None:
        super().__init__(init)
        self.num_started = self.num_waited = self.most_in_flight = 0

    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16)

    def memory(self) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)

    def graph_runner(self) -> GraphRunner:
        return PlainRunner()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def synchronize(self) -> None:
        """Nothing but copies is ever late."""

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        self.num_started += 1
        self.most_in_flight = max(self.most_in_flight, self.num_started - self.num_waited)
        return LateCopy(self, self.num_started, tensors)


class PlainRunner(GraphRunner):
    """Captures nothing."""

    def keys(self) -> Sequence[GraphKey]:
        return ()

    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        return work()


class LateCopy(HostCopy):
    """A copy that is made when it is waited for. `number`: counts a device's copies from 1."""

    def __init__(self, device: DelayedDevice, number: int, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.number = number
        self._device = device
        self._arrived: tuple[Tensor, ...] | None = None

    def wait(self) -> tuple[Tensor, ...]:
        if self._arrived is None:
            self._device.num_waited += 1
            self._arrived = tuple(tensor.clone() for tensor in self._tensors)
        return self._arrived
