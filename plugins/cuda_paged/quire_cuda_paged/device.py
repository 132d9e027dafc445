"""An NVIDIA GPU as a device: memory, pinned buffers. Steps run eagerly; no graphs are captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import Device, DeviceInit, GraphKey, GraphRunner, MemoryInfo
from torch import Tensor


class CudaOptions(BaseModel):
    """Options of the `cuda` device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: float = Field(default=0.06, ge=0.0, lt=1.0)
    """Share of the memory that is left alone, for the allocator's fragments and the libraries' workspaces."""


class CudaDevice(Device):
    """One GPU, the one that torch calls current unless an index is given."""

    def __init__(self, init: DeviceInit) -> None:
        super().__init__(init)
        self._options: CudaOptions = init.options or CudaOptions()
        index = init.index if init.index >= 0 else torch.cuda.current_device()
        self._device = torch.device("cuda", index)
        torch.cuda.set_device(self._device)

    def torch_device(self) -> torch.device:
        return self._device

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float16, torch.float32)

    def memory(self) -> MemoryInfo:
        """What other processes left, and what torch holds without using it, less the margin."""
        free, total = torch.cuda.mem_get_info(self._device)
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return MemoryInfo(total, max(0, free + idle - int(total * self._options.margin)))

    def graph_runner(self) -> GraphRunner:
        return EagerRunner()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class EagerRunner(GraphRunner):
    """Runs every step as it comes."""

    def keys(self) -> Sequence[GraphKey]:
        return ()

    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        return work()
