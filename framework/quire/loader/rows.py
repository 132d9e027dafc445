"""Rows of a stored matrix, read from its file as they are asked for."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor

from quire.errors import EngineError
from quire.loader.files import StoredTensor


class StoredRows:
    """Looks rows up in a checkpoint's file, so that the matrix need not lie in memory.

    For an embedding whose head keeps the same numbers packed. Rows are read rather than mapped: the
    pages around a mapped row would count as the process's memory, and a file that is cut short would
    kill it. A row of 2 KB takes about 2 µs once the system has the file in its cache.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored
        self._file = os.open(stored.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [T] on the host -> [T, columns] in the stored dtype. Raises EngineError if the file has changed."""
        stored = self._stored
        rows: Tensor = torch.ops.quire.stored_rows(
            ids, self._file, stored.offset, stored.shape[1], stored.dtype, str(stored.path)
        )
        return rows


def read_rows(ids: Tensor, file: int, offset: int, columns: int, dtype: torch.dtype, path: str) -> Tensor:
    """`StoredRows` of an open file."""
    rows = torch.empty(ids.shape[0], columns, dtype=dtype)
    if rows.numel() == 0:
        return rows
    buffer = rows.view(torch.uint8).numpy()
    size = buffer.shape[1]
    for row, index in zip(buffer, ids.tolist(), strict=True):
        if os.preadv(file, [row], offset + index * size) != size:
            raise EngineError(f"{path} has been cut short while its model was running")
    return rows


OPERATIONS: Any = torch.library.Library("quire", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Makes an operation of torch of it, which devices that record steps can run again.

By hand, for `torch.library.custom_op` imports torch's compiler at the first call, which takes seconds.
"""
OPERATIONS.define("stored_rows(Tensor ids, int file, int offset, int columns, ScalarType dtype, str path) -> Tensor")
OPERATIONS.impl("stored_rows", read_rows, "CPU")


def can_read_rows(stored: StoredTensor) -> bool:
    """Whether the system reads at an offset into a buffer, and the tensor is a matrix."""
    return hasattr(os, "preadv") and len(stored.shape) == 2
