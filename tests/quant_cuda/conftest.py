"""The kernels run in Triton's interpreter, which they must be told of when they are imported."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
import quire_quant.cuda_linear  # its kernels are decorated now
import quire_quant.float8_linear  # noqa: F401
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

del os.environ["TRITON_INTERPRET"]
assert isinstance(tl.cdiv, InterpretedFunction), "somebody imported triton before it could be told to interpret"


@pytest.fixture(autouse=True)
def interpreted(interpreter):
    """Every test here runs with the interpreter."""
