"""Main memory for large tensors, in the system's large pages where it has them.

A kernel that reads gigabytes for each token spends a good part of its time on looking pages of 4 KB up.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import time
import weakref
from collections import deque
from threading import Lock, Thread

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
CHUNK = 32 << 20
"""Bytes that a `HostArena` asks the system for at once."""
ALIGNMENT = 64
MADV_POPULATE_WRITE = 23
"""Linux 5.14: give the pages as if they were written, and leave what they hold."""
REST = 9
"""How long `PagesAhead` rests for each page while the process computes, in times of what that has taken. On two cores
prompts took 2 to 12 percent longer meanwhile, first writes included; with 3 it was 12 percent and more."""


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


class PagesAhead:
    """Has the system give pages before they are written, so that requests do not wait for them.

    Clearing a pool of gigabytes takes seconds, in a virtual machine many. The memory may be used meanwhile: a thread
    asks for a page of each tensor in turn, from their beginnings on, and rests while the process has other work.
    Where the system does not know how, it gives pages when they are written.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: deque[tuple[weakref.ref[Tensor], int]] = deque()  # and bytes of it that are there
        self._thread: Thread | None = None

    def add(self, memory: Tensor) -> None:
        """Take a contiguous tensor on; what is left of it is forgotten when nobody else holds it any more."""
        with self._lock:
            self._waiting.append((weakref.ref(memory), 0))
            if self._thread is None:
                self._thread = Thread(target=self._run, name="quire-pages", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until all pages are there, or the system has said that it does not know how."""
        if (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            reference, done = found
            memory = reference()
            if memory is None:
                continue
            began, computed = time.perf_counter(), _computed_by_others()
            size = min(LARGE_PAGE, memory.nbytes - done)
            knows_how = populate(memory.data_ptr() + done, size)
            took = time.perf_counter() - began
            idle = _computed_by_others() - computed < took / 10
            with self._lock:
                if not knows_how:
                    self._waiting.clear()
                elif done + size < memory.nbytes:
                    self._waiting.append((reference, done + size))
            del memory
            time.sleep(0 if idle else REST * took)

    def _next(self) -> tuple[weakref.ref[Tensor], int] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None


def _computed_by_others() -> float:
    """Seconds that the process's other threads have computed for."""
    return time.process_time() - time.thread_time()


def populate(address: int, num_bytes: int) -> bool:
    """Have the pages of this memory given; whether the system could."""
    if sys.platform != "linux":
        return False
    begin = address - address % mmap.PAGESIZE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done: int = madvise(begin, address + num_bytes - begin, MADV_POPULATE_WRITE)
    return done == 0
