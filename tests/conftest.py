"""What every test starts with, and what tests of several folders share."""

import functools
import inspect
import logging
import os

import numpy as np
import pytest
import torch


def pytest_collection_finish():
    """Forget switches such as QUIRE_NODE_TESTS: modules have read them, and the program refuses unknown options."""
    for name in [name for name in os.environ if name.startswith("QUIRE_") and name.endswith("_TESTS")]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def the_log_is_put_back():
    """The program sets up the log of `quire` for its process; the tests share one."""
    logger = logging.getLogger("quire")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter, made right where it is not: kernels run on the CPU, one program after another.

    Kernels are made interpretable when they are decorated, and Triton's own helpers when it is imported: the
    conftest.py of a folder of kernels does both before any test runs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    exact_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        """bfloat16 is kept as raw 16 bits, and multiplied as such; as float32 it is exact."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self, a, b, *rest):
        return exact_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    exact_cast = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        """To bfloat16 it cuts the last bits off; a GPU rounds to the nearest, to even."""
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return exact_cast(self, source, target)
        bits = source.data.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = np.where(np.isnan(source.data), (bits >> 16) | 1, nearest)
        return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    exact_conversion = interpreter.InterpreterBuilder.create_fp_to_fp

    def convert(self, source, target, rounding_mode):
        """To 8 bits it rounds halves up, and loses the carry; a GPU rounds to the nearest, to even."""
        if source.dtype.scalar != tl.float32 or target.scalar != tl.float8e4nv:
            return exact_conversion(self, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(rounded, tl.float8e4nv)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", convert)
    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor, *rest):
        """Triton 3.6 turns an array of one element into an int in a way that numpy 2.4 refuses."""
        result = patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)

    def patch_builtin(package, builder, *rest):
        """Triton looks through the whole language anew whenever a kernel calls a helper: a third of a test's time."""
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else it is replaced already
                interpreter._patch_attr(package, name, member, builder, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_builtin)


@functools.cache
def builtins_of(package):
    """What the interpreter replaces of a part of the language, by name."""
    import triton.language as tl

    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
