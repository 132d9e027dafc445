"""The kernels run in Triton's interpreter, which they must be told of when they are imported.

The interpreter takes seconds for what a GPU does in microseconds: of the kits' larger tables the default suite has the
small matrix below, in which every kind of case occurs, and `pytest -m kernels` the rest.
"""

import os
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"
import quire_cuda_paged.attention
import quire_cuda_paged.ops
import quire_cuda_paged.sampler  # noqa: F401
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

del os.environ["TRITON_INTERPRET"]
assert isinstance(tl.cdiv, InterpretedFunction), "somebody imported triton before it could be told to interpret"


SMALL = {
    "test_equals_the_oracle": """
        mha-prefill gqa-decode mqa-mixed window-chunked softcap-verification sinks-decode window_and_sinks-mixed
        alibi-chunked alibi,_softcap,_window-decode other_v_size-prefill""",
    "test_long_context": "gqa-decode window-mixed sinks-verification",
    "test_prepare_qkv_equals_the_composition": """
        none-0-neox offset-16-gptj unlike-32-gptj one-16-neox""",
    "test_kv_dtypes": "fp8_e4m3-mixed",
    "test_scales_of_8_bit_floats": "mixed",
    "test_dtypes": "torch.bfloat16 torch.float16",
    "test_padding": "mixed few",
    "test_a_captured_plan_serves_other_mixes": "window sinks",
    "test_a_captured_plan_serves_later_steps": "gqa-1 window-3 sinks-3",
    "test_odd_sizes_in_every_dtype": """
        (3,_1,_24,_24,_8)-torch.float32-auto (9,_3,_80,_40,_80)-torch.bfloat16-fp8_e4m3
        (10,_2,_96,_96,_48)-torch.float16-auto (3,_1,_24,_24,_8)-torch.bfloat16-auto""",
    "test_deterministic_forms_do_not_see_their_neighbours": "rms_norm-torch.bfloat16 odd_gated_act-torch.float32",
    "test_head_counts": "(14,_2) (9,_1)",
    "test_head_sizes": "24 80",
    "test_block_sizes": "3 64",
    "test_rms_norm": """
        0-1.0-torch.float32 1-0.0-torch.bfloat16 2-1.0-torch.float16 3-0.0-torch.float32 7-1.0-torch.bfloat16
        16-0.0-torch.float16 17-1.0-torch.float32 33-0.0-torch.bfloat16 33-1.0-torch.float16""",
    "test_gated_act": """
        0-silu-torch.float32 1-gelu-torch.bfloat16 2-gelu_tanh-torch.float16 3-silu-torch.bfloat16 7-gelu-torch.float32
        16-gelu_tanh-torch.bfloat16 17-silu-torch.float16 33-gelu_tanh-torch.float32""",
    "test_tokens_equal_the_reference": "1-0 60-0 60-1 2500-0",
}
"""Test of a kit -> its cases in the default suite, with `_` for a space."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    for name, small in SMALL.items():
        cases = {item.callspec.id.replace(" ", "_"): item for item in here if item.originalname == name}
        unknown = set(small.split()) - set(cases)
        if unknown and len(cases) > len(small.split()):  # else single cases were asked for
            raise pytest.UsageError(f"{name} has no cases {sorted(unknown)}")
        for case in set(cases) - set(small.split()):
            cases[case].add_marker(pytest.mark.kernels)


@pytest.fixture(autouse=True)
def interpreted(interpreter):
    """Every test here runs with the interpreter."""
