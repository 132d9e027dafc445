"""The compiled kernels as Python functions. ctypes lets go of the interpreter's lock while one runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quire_cpu_native.build import built

SUFFIXES: Mapping[torch.dtype, str] = MappingProxyType({torch.float32: "f32", torch.bfloat16: "bf16"})
"""Compute dtypes that there are kernels for."""
PANEL = 64
"""Outputs that are packed together."""
TYPES: Mapping[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES: Mapping[str, str] = MappingProxyType(
    {
        "linear_pack": "pppii",
        "linear": "ppppipiii",
        "rms_norm": "pppppiiff",
        "gated_act": "ppipiii",
        "prepare": "pppippppppppi",
        "attention": "pppippppppippi",
        "codes_pack": "pppp",
        "codes_weight": "ppp",
        "codes_linear": "ppppipi",
        "codes_linear_a8": "ppppipi",
        "sample": "pppp",
    }
)
"""Function -> its arguments: pointers, whole numbers, floats. The first is the pool of threads."""


class HeadsFields(ctypes.Structure):
    """`Heads` of rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_weight", "k_weight")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "half", "neox")),
        *((name, ctypes.c_float) for name in ("q_eps", "k_eps", "q_offset", "k_offset")),
    )


class LayerFields(ctypes.Structure):
    """`Layer` of attention.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "window", "block_size")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("sinks", ctypes.c_void_p),
    )


class CodesFields(ctypes.Structure):
    """`Codes` of quant.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "bits", "group", "half_scales")),
        ("middle", ctypes.c_float),
    )


class SamplingFields(ctypes.Structure):
    """`Sampling` of sampler.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("temperature", "top_p", "min_p", "top_k", "seeds", "positions")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride")),
    )


class Native:
    """A loaded object with a pool of threads.

    Args:
        path: the shared object. threads: that compute, the caller's among them.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.quire_pool_new.restype = ctypes.c_void_p
        self._library.quire_pool_new.argtypes = (ctypes.c_int64,)
        self._library.quire_pool_delete.argtypes = (ctypes.c_void_p,)
        self.pool = self._library.quire_pool_new(threads)
        if self.pool is None:
            raise RuntimeError(f"the system refuses to start {threads - 1} more threads")

    def function(self, name: str, dtype: torch.dtype | None = None, form: str = "") -> Callable[..., Any]:
        """A kernel for a dtype, in a form if there are several; its first argument, the pool, is given already."""
        parts = ("quire", name, form, "" if dtype is None else SUFFIXES[dtype])
        found: Any = self._library["_".join(part for part in parts if part)]
        found.restype, found.argtypes = None, [TYPES[letter] for letter in SIGNATURES[name]]
        found.owner = self  # whose end would be the pool's
        return functools.partial(found, self.pool)

    def __del__(self) -> None:
        pool = self.__dict__.pop("pool", None)
        if pool is not None:
            self._library.quire_pool_delete(pool)


@functools.cache
def native(threads: int) -> Native:
    """This machine's kernels: one pool of threads serves all engines of the process."""
    return Native(built(), threads)


def address(tensor: Tensor | None) -> int | None:
    """Of the first element."""
    return None if tensor is None else tensor.data_ptr()


def row_major(x: Tensor) -> Tensor:
    """x [T, K] with its rows' elements side by side; the rows may be apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x [T, width] as `row_major` gives it, and how many elements its rows are apart."""
    if x.is_contiguous():
        return x, width
    x = row_major(x)
    return x, x.stride(0)
