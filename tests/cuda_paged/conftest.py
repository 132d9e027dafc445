"""Triton's interpreter, made right where it is not: the kernels run on the CPU, one program after another.

Kernels are made interpretable when they are decorated, and Triton's own helpers when it is imported;
both happen here, before any test runs.
"""

import os
import sys

import numpy as np
import pytest

assert "triton" not in sys.modules, "somebody imported triton before it could be told to interpret"
os.environ["TRITON_INTERPRET"] = "1"
import quire_cuda_paged.attention  # noqa: E402, F401  its kernels are decorated now
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Every test here runs with the interpreter, whose two faults are mended."""
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
    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor, *rest):
        """Triton 3.6 turns an array of one element into an int in a way that numpy 2.4 refuses."""
        result = patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
