"""What a step sends to the device: packed into one host buffer, copied at once.

A step that runs may still be reading its buffer, so as many buffers take turns as steps may be in
flight. On the device there is one: copies and the work that reads them follow each other there. A
device that computes in the host's memory, and is done when a call returns, reads the host's one buffer.
What is put first, in the same sizes, stands at the same address every time, as captured graphs need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.contract.device import Device

ALIGNMENT = 64
"""Bytes; kernels load aligned addresses in wide pieces, and are compiled anew for others."""
IN_FLIGHT = 2
"""Steps that may be in flight at once, the one being launched included."""
MOST_KNOWN = 4096
"""Vectors whose views are kept: one decode step is like the other, and making views takes longer than filling them."""
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float32: np.dtype(np.float32),
}
_TORCH = {array: tensor for tensor, array in _NUMPY.items()}


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room for a vector: the array to fill it through, and the same bytes as the CPU's and the device's tensor."""

    array: NDArray[Any]
    host: Tensor
    device: Tensor


class Staging:
    """The step's buffer.

    Args:
        device: where it goes.
        num_bytes: of a buffer; what finds no room is sent alone, which the host waits for.

    Attributes:
        turn: number of the buffer that the present step has. used: bytes of it that are taken.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._torch_device = device.torch_device()
        shared = self._torch_device.type == "cpu" and not device.runs_async
        self._hosts = [device.host_buffer((num_bytes,), torch.uint8) for _ in range(1 if shared else IN_FLIGHT)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._device = None if shared else torch.zeros(num_bytes, dtype=torch.uint8, device=self._torch_device)
        self._num_bytes = num_bytes
        self._known: dict[tuple[int, int, int, torch.dtype], Reserved] = {}
        self.turn = self.used = 0

    def begin(self) -> None:
        """Start a step: take the buffer of the step that ended longest ago."""
        self.turn = (self.turn + 1) % len(self._hosts)
        self.used = 0

    def reserve(self, length: int, dtype: torch.dtype) -> Reserved:
        """Room for a vector, to be filled before `send`. Raises ValueError if there is none.

        The device's tensor is valid from `send` to the next step's, the CPU's until the turn comes round again.
        """
        start, end = self.used, self.used + length * dtype.itemsize
        if end > self._num_bytes:
            raise ValueError(f"{end - start} bytes find no room in a step's buffer of {self._num_bytes}")
        self.used = -(-end // ALIGNMENT) * ALIGNMENT
        place = (self.turn, start, length, dtype)
        known = self._known.get(place)
        if known is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            known = self._known[place] = self._reserved(start, end, dtype)
        return known

    def take(self, end: int) -> None:
        """Take the room up to this byte, all of which was reserved by an earlier step of the same turn."""
        self.used = end

    def put(self, values: NDArray[Any]) -> Tensor:
        """A vector on the device; its content comes with `send`."""
        if self.used + values.nbytes > self._num_bytes:
            return torch.from_numpy(values).to(self._torch_device)
        reserved = self.reserve(len(values), _TORCH[values.dtype])
        reserved.array[:] = values
        return reserved.device

    def send(self) -> None:
        """Start the copy, behind all work that was handed to the device before."""
        if self._device is not None:
            used = min(self.used, self._num_bytes)
            self._device[:used].copy_(self._hosts[self.turn][:used], non_blocking=True)

    def _reserved(self, start: int, end: int, dtype: torch.dtype) -> Reserved:
        host = self._hosts[self.turn]
        view = host[start:end].view(dtype)
        device = view if self._device is None else self._device[start:end].view(dtype)
        return Reserved(self._arrays[self.turn][start:end].view(_NUMPY[dtype]), view, device)
