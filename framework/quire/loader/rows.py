"""Rows of a stored matrix, read from its file as they are asked for."""

from __future__ import annotations

import os
import weakref

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
        columns = self._stored.shape[1]
        rows = torch.empty(ids.shape[0], columns, dtype=self._stored.dtype)
        if rows.numel() == 0:
            return rows
        buffer = rows.view(torch.uint8).numpy()
        size = buffer.shape[1]
        for row, index in zip(buffer, ids.tolist(), strict=True):
            if os.preadv(self._file, [row], self._stored.offset + index * size) != size:
                raise EngineError(f"{self._stored.path} has been cut short while its model was running")
        return rows


def can_read_rows(stored: StoredTensor) -> bool:
    """Whether the system reads at an offset into a buffer, and the tensor is a matrix."""
    return hasattr(os, "preadv") and len(stored.shape) == 2
