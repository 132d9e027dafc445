"""Compiles every launch of the CUDA kernels for every GPU generation, without a GPU, and shows what each needs.

    python scripts/aot_check.py [--arch 80,90] [--json]

Uses the assembler and disassembler that Triton's wheel brings. A launch is wrong if it does not compile, needs
more shared memory than the GPU has, lacks the tensor core instruction that it should use, or spills registers
(more than MAX_SPILLS instructions; Triton 3.6 has none, 3.7 a few on sm_80). Exit code 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from quire_cuda_paged.kernels import combine_kernel, paged_attention_kernel, plan_kernel
from quire_cuda_paged.row_kernels import gated_act_kernel, prepare_qkv_kernel, rms_norm_kernel
from quire_cuda_paged.tuning import Launch, tuning_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may have."""
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instruction that multiplies matrices in the prefill shape; decode's 16 rows are too few for the newer ones."""
MAX_SPILLS = 8
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "table_ptr": "i32", "seq_lens_ptr": "i32", "query_start_ptr": "i32", "split_start_ptr": "i32", "chunk_ptr": "i32",
    "end_ptr": "i32", "part_ptr": "fp32", "part_lse_ptr": "fp32", "sink_ptr": "fp32", "cos_ptr": "fp32",
    "sin_ptr": "fp32", "slots_ptr": "i64",
}  # fmt: skip
"""Element types of pointers; all others point to the compute dtype."""
FLOATS = ("scale", "softcap", "eps", "offset", "q_eps", "k_eps", "q_offset", "k_offset")
"""Arguments that are numbers with a fraction."""
ALIGNED = ("out_ptr", "part_ptr", "q_ptr", "k_ptr", "v_ptr", "q_token", "out_token", "k_block", "k_slot", "k_head",
           "v_block", "v_slot", "v_head", "x_ptr", "weight_ptr", "residual_ptr", "x_row", "residual_row", "turned_ptr",
           "qkv_ptr", "qkv_row", "k_cache_ptr", "v_cache_ptr", "cos_ptr", "sin_ptr", "cos_row")  # fmt: skip
"""Arguments that are multiples of 16 when the engine launches: without that, loads are not 16 bytes wide."""


@dataclass(frozen=True, slots=True)
class Case:
    """One launch for one architecture."""

    arch: int
    name: str
    launch: Launch
    constants: dict[str, Any]
    dtype: str = "bf16"


@dataclass(slots=True)
class Found:
    """What the compiled launch needs, and what is wrong with it."""

    arch: int
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    tensor_core: int = 0
    problems: list[str] = field(default_factory=list)


def cases(archs: list[int]) -> Iterator[Case]:
    """Decode and prefill for the head sizes in use, plain and with every feature."""
    for arch in archs:
        for head_dim in (64, 128, 256):
            tuning = tuning_for(divmod(arch, 10), head_dim)
            for split, launch in ((True, tuning.decode), (False, tuning.prefill)):
                name = f"{'decode' if split else 'prefill'} D{head_dim}"
                yield Case(arch, name, launch, constants(head_dim, launch, split))
        tuning = tuning_for(divmod(arch, 10), 128)
        features = {"WINDOW": 128, "SOFTCAP": True, "SINKS": True}
        yield Case(arch, "decode D128 all features", tuning.decode, constants(128, tuning.decode, True) | features)
        yield Case(
            arch, "prefill D128 window sinks", tuning.prefill,
            constants(128, tuning.prefill, False) | {"WINDOW": 128, "SINKS": True},
        )  # fmt: skip


def constants(head_dim: int, launch: Launch, split: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments, for 32 query heads and 8 KV heads."""
    return {
        "HEADS": 32, "GROUP": 4, "D": head_dim, "D_PAD": head_dim, "DV": head_dim, "DV_PAD": head_dim,
        "BLOCK_SIZE": 16, "BLOCK_M": launch.block_m, "TILE": launch.tile, "SPLIT": split, "WINDOW": 0,
        "SOFTCAP": False, "SINKS": False, "PRECISION": "tf32",
    }  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], arch: int, dtype: str, launch: Launch) -> Any:
    """The kernel for an architecture."""
    names = kernel.arg_names
    widths = {param.name: param.annotation_type for param in kernel.params if param.annotation_type}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return f"*{POINTERS.get(name, dtype)}"
        return "fp32" if name in FLOATS else widths.get(name, "i32")

    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(binary: Any) -> tuple[dict[str, int], str]:
    """(resources, disassembly) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says no resources: {usage[-300:]}")
    values = dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))
    values["shared"] += binary.metadata.shared
    return values, listing


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=False).stdout


def check(case: Case) -> Found:
    """Compile one launch, and judge it."""
    found = Found(case.arch, case.name)
    try:
        binary = compiled(paged_attention_kernel, case.constants, case.arch, case.dtype, case.launch)
        values, listing = inspect(binary)
    except Exception as error:
        found.problems.append(_reason(error))
        return found
    wanted = TENSOR_CORE[case.arch] if not case.constants["SPLIT"] and case.launch.block_m >= 64 else "HMMA"
    found.registers, found.shared, found.stack = values["registers"], values["shared"], values["stack"]
    found.spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    found.tensor_core = len(re.findall(rf"\b{wanted}\b", listing))
    if found.shared > SHARED_KB[case.arch] * 1024:
        found.problems.append(f"{found.shared} bytes of shared memory; {SHARED_KB[case.arch]} KB are there")
    if found.spills > MAX_SPILLS:
        found.problems.append(f"{found.spills} spill instructions")
    if not found.tensor_core:
        found.problems.append(f"no {wanted}")
    return found


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line; Triton wraps it in listings of the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"


def small_kernels() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name -> kernel, compile-time arguments, warps: what multiplies no matrices, and only must not spill."""
    heads = {"HEADS": 32, "KV_HEADS": 8, "D": 128, "D_PAD": 128, "DV": 128, "DV_PAD": 128, "TILE": 8}
    return {
        "plan": (plan_kernel, {"TILE": 64, "MIN_TILES": 2, "ROWS": 256}, 4),
        "combine": (combine_kernel, {"HEADS": 32, "DV": 128, "DV_PAD": 128, "BLOCK_Q": 4}, 4),
        "rms_norm": (rms_norm_kernel, {"SIZE": 4096, "BLOCK": 4096, "RESIDUAL": True, "OFFSET": False}, 8),
        "gated_act": (gated_act_kernel, {"SIZE": 14336, "BLOCK": 1024, "ACTIVATION": "silu"}, 4),
        "prepare_qkv": (prepare_qkv_kernel, {**heads, "HALF": 64, "NEOX": True, "Q_NORM": 1, "K_NORM": 1}, 4),
    }


def check_small_kernel(name: str, arch: int) -> Found:
    """Compile one of `small_kernels`, and judge it."""
    found = Found(arch, name)
    kernel, fixed, num_warps = small_kernels()[name]
    try:
        values, listing = inspect(compiled(kernel, fixed, arch, "bf16", Launch(16, 64, num_warps, 3)))
    except Exception as error:
        found.problems.append(_reason(error))
        return found
    found.registers, found.shared, found.stack = values["registers"], values["shared"], values["stack"]
    found.spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    if found.spills:
        found.problems.append(f"{found.spills} spill instructions")
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(map(str, SHARED_KB)), help="compute capabilities without the dot")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    arguments = parser.parse_args()
    archs = [int(arch) for arch in arguments.arch.split(",")]
    results = [
        *(check(case) for case in cases(archs)),
        *(check_small_kernel(name, arch) for arch in archs for name in small_kernels()),
    ]
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "launches": [asdict(result) for result in results]}))
    else:
        print(f"triton {triton.__version__}\n{'arch':7}{'launch':28}{'regs':>5}{'shared':>8}{'spills':>7}{'mma':>5}")
        for row in results:
            numbers = f"{row.registers:5}{row.shared:8}{row.spills:7}{row.tensor_core:5}"
            print(f"sm_{row.arch:<4}{row.name:28}{numbers}  {'; '.join(row.problems)}")
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
