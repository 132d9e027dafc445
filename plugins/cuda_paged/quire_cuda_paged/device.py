"""An NVIDIA GPU as a device: memory that is measured, pinned buffers, copies on a stream of their own, graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import Device, DeviceInit, GraphRunner, HostCopy, MemoryInfo
from torch import Tensor

from quire_cuda_paged.graphs import DECODE_SIZES, MIXED_SIZES, CudaGraphRunner


class CudaOptions(BaseModel):
    """Options of the `cuda` device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: float = Field(default=0.06, ge=0.0, lt=1.0)
    """Share of the memory that is left alone, for the allocator's fragments and the libraries' workspaces."""
    graph_decode_sizes: tuple[int, ...] = Field(default=DECODE_SIZES)
    """Rows of the decode steps that are captured as graphs; none: they run eagerly."""
    graph_mixed_sizes: tuple[int, ...] = Field(default=MIXED_SIZES)
    """Tokens of the mixed steps that are captured as graphs, where every component can run inside one."""


class CudaDevice(Device):
    """One GPU, the one that torch calls current unless an index is given."""

    runs_async: ClassVar[bool] = True

    def __init__(self, init: DeviceInit) -> None:
        super().__init__(init)
        self._options: CudaOptions = init.options or CudaOptions()
        index = init.index if init.index >= 0 else torch.cuda.current_device()
        self._device = torch.device("cuda", index)
        torch.cuda.set_device(self._device)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def torch_device(self) -> torch.device:
        return self._device

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float16, torch.float32)

    def memory(self) -> MemoryInfo:
        """What other processes left, and what torch holds without using it, less the margin: all for the pool."""
        free, total = torch.cuda.mem_get_info(self._device)
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return MemoryInfo(total, max(0, free + idle - int(total * self._options.margin)), kv_share=1.0)

    def graph_runner(self) -> GraphRunner:
        options = self._options
        return CudaGraphRunner(self._device, options.graph_decode_sizes, options.graph_mixed_sizes)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """On a stream of its own, so that the next step's kernels need not wait for it."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        arriving = []
        with torch.cuda.stream(self._copies):
            for tensor in tensors:
                tensor.record_stream(self._copies)  # its memory is not given to others meanwhile
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                arriving.append(pinned.copy_(tensor, non_blocking=True))
            done = self._copies.record_event()
        return CudaCopy(arriving, done)

    def peak_memory(self, work: Callable[[], Any]) -> int:
        """By the allocator's own account, fragments included. The first run lets libraries allocate what they keep."""
        work()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        return peak


class CudaCopy(HostCopy):
    """A copy that has ended when its event has."""

    def __init__(self, tensors: Sequence[Tensor], done: torch.cuda.Event) -> None:
        super().__init__(tensors)
        self._done = done

    def wait(self) -> tuple[Tensor, ...]:
        self._done.synchronize()
        return super().wait()
