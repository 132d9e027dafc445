"""Main memory for large tensors, in the system's large pages where it has them.

A kernel that reads gigabytes for each token spends a good part of its time on looking pages of 4 KB up.
"""

from __future__ import annotations

import contextlib
import mmap
from threading import Lock

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
CHUNK = 32 << 20
"""Bytes that a `HostArena` asks the system for at once."""
ALIGNMENT = 64


def host_zeros(num_bytes: int) -> Tensor:
    """Zeroed memory, uint8 [num_bytes], which begins at a large page.

    The system gives it page by page as it is first written. Raises MemoryError if it refuses.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        room = mmap.mmap(-1, num_bytes + LARGE_PAGE, **private)
    except OSError as error:
        raise MemoryError(f"the system refuses {num_bytes} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    return whole[-whole.data_ptr() % LARGE_PAGE :][:num_bytes]


class HostArena:
    """Memory for many tensors that live about as long as each other, such as weights: they share large pages.

    A chunk goes back to the system when no tensor in it is left. May be used by several threads.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] at a multiple of 64 bytes, with any content. Raises MemoryError."""
        taken = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if taken > len(self._left):
                self._left = host_zeros(max(taken, CHUNK))
            found, self._left = self._left[:num_bytes], self._left[taken:]
        return found
