"""Devices that compute where the host does: main memory within the container's limit, no pinned buffers, no waiting."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from quire.contract.device import Device, DeviceInit, GraphKey, GraphRunner, HostCopy, MemoryInfo
from quire.contract.host_memory import PagesAhead, host_zeros

CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and use of a container, cgroup version 2 and 1."""

AT_ONCE = 16 << 20
"""Bytes of each tensor that are there before the first request: some thousand tokens. The rest comes ahead of use."""


class HostDeviceOptions(BaseModel):
    """Options of a `HostDevice`; one that takes more derives its own from these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int | None = Field(default=None, ge=1)
    """Threads that torch computes with; None: torch's own choice."""


class HostDevice(Device):
    """The machine's processor and main memory; steps run eagerly."""

    def __init__(self, init: DeviceInit) -> None:
        super().__init__(init)
        options: HostDeviceOptions = init.options or HostDeviceOptions()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._pages = PagesAhead()

    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def dtypes(self) -> tuple[torch.dtype, ...]:
        # Without native bfloat16 arithmetic, float32 is both faster and more exact.
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return (torch.bfloat16, torch.float32, torch.float16)
        return (torch.float32, torch.bfloat16, torch.float16)

    def memory(self) -> MemoryInfo:
        total, available = _machine_memory()
        for limit_path, use_path in CGROUP_LIMITS:
            limit, use = _number(limit_path), _number(use_path)
            if limit is not None and use is not None and limit < total:
                total, available = limit, min(available, max(0, limit - use))
        return MemoryInfo(total, available)

    def graph_runner(self) -> GraphRunner:
        return EagerRunner()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = host_zeros(math.prod(shape) * dtype.itemsize)
        memory[:AT_ONCE].zero_()  # by all threads, once more: so that its pages are there
        found = memory.view(dtype).view(*shape)
        self._pages.add(found)
        return found

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        return HostCopy(tensors)  # who has them keeps them as they are until he has waited

    def synchronize(self) -> None:
        """Every operation has ended when its call returns."""


class EagerRunner(GraphRunner):
    """Runs every step as it comes."""

    def keys(self) -> Sequence[GraphKey]:
        return ()

    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        return work()


def _machine_memory() -> tuple[int, int]:
    """Bytes of main memory in all, and available."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        sizes = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) >= 2}
        return sizes["MemTotal"], sizes["MemAvailable"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2  # nothing portable says how much is in use


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or the word `max`
        return None
