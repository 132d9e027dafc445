"""Kernels in place of those operations of torch that a decode step has: they move tokens, and rows by tokens.

Torch takes longer to begin one of them, behind a step that has pushed it out of the caches, than it takes to do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Found = tuple[str, tuple[Any, ...]] | None
"""Name of a kernel, and what to call it with."""


def move(function: Any, arguments: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    """The kernel that does what an operation has done to these arguments, by their names; None if there is none.

    Args:
        function: an overload of an operation. result: the tensor that it has returned.
        failed: address of a whole number of 64 bits, which is set where the operation has to say what is wrong.
    """
    find = MOVES.get(str(function))
    return None if find is None else find(arguments, result, failed)


def _gather(source: str, index: str, given: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    return _by_rows("gather", given[source], given[index], result, failed) if not given.get("dim") else None


def _scatter(given: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    return _by_rows("scatter", given["self"], given["index"], given["source"], failed) if not given["dim"] else None


def _by_rows(kernel: str, matrix: Tensor, index: Tensor, rows: Tensor, failed: int) -> Found:
    """Between rows [N, ...] and those of a matrix [M, ...] that index [N] names."""
    fits = index.dtype is torch.int64 and index.dim() == 1 and matrix.dtype is rows.dtype and matrix.dim() > 0
    if not (fits and all(each.is_contiguous() for each in (matrix, index, rows))):
        return None
    size = matrix.stride(0) * matrix.itemsize
    places = (matrix.data_ptr(), len(matrix), size, index.data_ptr(), len(index), rows.data_ptr(), failed)
    return kernel, places


def _read_rows(given: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    ids = given["ids"]
    if not ids.is_contiguous() or ids.dtype is not torch.int64:
        return None
    size = given["columns"] * result.itemsize
    return "read_rows", (ids.data_ptr(), len(ids), given["file"], given["offset"], size, result.data_ptr(), failed)


def _widen(given: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    wide, narrow = given["self"], given["src"]
    dtypes = narrow.dtype is torch.int32 and wide.dtype is torch.int64
    if not dtypes or narrow.shape != wide.shape or not (narrow.is_contiguous() and wide.is_contiguous()):
        return None
    return "widen", (narrow.data_ptr(), narrow.numel(), wide.data_ptr())


def _at_least(given: Mapping[str, Any], result: Tensor, failed: int) -> Found:
    values, least = given["self"], given.get("min")
    whole = values.dtype is torch.int32 is result.dtype and values.is_contiguous() and result.is_contiguous()
    if not whole or not isinstance(least, int) or given.get("max") is not None:
        return None
    return "at_least", (values.data_ptr(), values.numel(), least, result.data_ptr())


MOVES: Mapping[str, Callable[[Mapping[str, Any], Tensor, int], Found]] = MappingProxyType(
    {
        "aten.index_select.default": partial(_gather, "self", "index"),
        "aten.embedding.default": partial(_gather, "weight", "indices"),
        "aten.index_copy_.default": _scatter,
        "aten.copy_.default": _widen,
        "aten.clamp.default": _at_least,
        "quire.stored_rows.default": _read_rows,
    }
)
"""Operation -> what finds its kernel."""
