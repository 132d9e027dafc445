"""The compiled kernels as Python functions. ctypes lets go of the interpreter's lock while one runs."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from quire.plugin import HostArena
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
        "attention": "pppippppppippii",
        "codes_pack": "pppp",
        "codes_weight": "ppp",
        "codes_linear": "ppppipi",
        "codes_linear_a8": "ppppipi",
        "sample": "ppiiippppppp",
        "choose": "ppiiippppppp",
        "argmax": "ppipii",
        "gather": "ppiipipp",
        "scatter": "ppiipipp",
        "read_rows": "ppiiiipp",
        "widen": "ppip",
        "at_least": "ppiip",
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


class CallFields(ctypes.Structure):
    """`Call` of recorded.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("kernel", "pool", "words"))


class Kernel:
    """A compiled kernel, whose first argument, the pool, is given already.

    Attributes:
        library: where it is from, whose end would be the pool's.
        recorded: address of its sibling that takes the same arguments as words.
    """

    __slots__ = ("_letters", "_run", "library", "recorded")

    def __init__(self, library: Native, found: Any, recorded: Any, letters: str) -> None:
        found.restype, found.argtypes = None, [TYPES[letter] for letter in letters]
        self.library = library
        self.recorded: int = ctypes.cast(recorded, ctypes.c_void_p).value or 0
        self._run = functools.partial(found, library.pool)
        self._letters = letters[1:]

    def __call__(self, *arguments: Any) -> None:
        self._run(*arguments)
        listener = LISTENER.get()
        if listener is not None:
            listener(self, arguments)

    def words(self, arguments: tuple[Any, ...]) -> list[int]:
        """Arguments in the form that `recorded` takes."""
        return [_word(letter, value) for letter, value in zip(self._letters, arguments, strict=True)]


LISTENER: ContextVar[Callable[[Kernel, tuple[Any, ...]], None] | None] = ContextVar("LISTENER", default=None)
"""Who is told of each call of a kernel in this thread, behind it."""


class Native:
    """A loaded object with a pool of threads.

    Args:
        path: the shared object. threads: that compute, the caller's among them.

    Attributes:
        pool: address of the pool.
        memory: for weights.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.memory = HostArena()
        self._library = ctypes.CDLL(str(path))
        self._library.quire_pool_new.restype = ctypes.c_void_p
        self._library.quire_pool_new.argtypes = (ctypes.c_int64,)
        self._library.quire_pool_delete.argtypes = (ctypes.c_void_p,)
        self._library.quire_replay.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._library.quire_replay.restype = None
        self.pool = self._library.quire_pool_new(threads)
        if self.pool is None:
            raise RuntimeError(f"the system refuses to start {threads - 1} more threads")

    def function(self, name: str, dtype: torch.dtype | None = None, form: str = "") -> Kernel:
        """A kernel for a dtype, in a form if there are several."""
        parts = ("quire", name, form, "" if dtype is None else SUFFIXES[dtype])
        symbol = "_".join(part for part in parts if part)
        return Kernel(self, self._library[symbol], self._library[f"{symbol}_recorded"], SIGNATURES[name])

    def replay(self, calls: int, count: int) -> None:
        """Run so many calls, whose `CallFields` stand one behind the other from this address on."""
        self._library.quire_replay(calls, count)

    def __del__(self) -> None:
        pool = self.__dict__.pop("pool", None)
        if pool is not None:
            self._library.quire_pool_delete(pool)


def _word(letter: str, value: Any) -> int:
    if letter == "f":
        word: int = struct.unpack("<I", struct.pack("<f", value))[0]
        return word
    return (value or 0) & 0xFFFFFFFFFFFFFFFF


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
