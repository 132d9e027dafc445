"""Compiles every launch of the CUDA kernels for every GPU generation, without a GPU, and shows what each needs.

    python scripts/aot_check.py [--arch 80,90] [--quick] [--json]

Uses the assembler and disassembler that Triton's wheel brings. A launch is wrong if it does not compile, needs
more shared memory than the GPU has, lacks the tensor core instruction that it should use, spills registers, or would be
compiled anew while it serves.
Triton 3.6 is the gate, with no spill and no stack at all; other versions may spill a little (MAX_SPILLS), which
the table shows. Exit code 1 if a launch is wrong. To check the gate beside another Triton:

    pip install --no-deps --target FOLDER triton==3.6.0; PYTHONPATH=FOLDER python scripts/aot_check.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from quire_cuda_paged.attention import FIRST_WITH_FP8
from quire_cuda_paged.kernels import combine_kernel, paged_attention_kernel, plan_kernel
from quire_cuda_paged.row_kernels import gated_act_kernel, prepare_qkv_kernel, rms_norm_kernel
from quire_cuda_paged.sampler import NUM_WARPS, CudaSampler, num_blocks
from quire_cuda_paged.sampling_kernels import sample_kernel
from quire_cuda_paged.tuning import Launch, tuning_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may have."""
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}
"""The instruction that multiplies matrices in the prefill shape; decode's 16 rows are too few for the newer ones."""
OLDER_TENSOR_CORE = "HMMA"
GATE = (3, 6)
MAX_SPILLS = 32
"""Spill instructions of a launch that are reported and let pass by a Triton that is not the gate."""
VOCAB_SIZE = 151_936
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "table_ptr": "i32", "seq_lens_ptr": "i32", "query_start_ptr": "i32", "split_start_ptr": "i32",
    "block_start_ptr": "i32", "work_start_ptr": "i32", "chunk_ptr": "i32",
    "part_ptr": "fp32", "part_lse_ptr": "fp32", "sink_ptr": "fp32", "slope_ptr": "fp32",
    "cos_ptr": "fp32", "sin_ptr": "fp32", "slots_ptr": "i64", "logits_ptr": "fp32", "temperature_ptr": "fp32",
    "top_k_ptr": "i32", "top_p_ptr": "fp32", "min_p_ptr": "fp32", "seed_ptr": "i64", "position_ptr": "i64",
}  # fmt: skip
"""Element types of pointers; all others point to the compute dtype."""
FP8 = {"k_ptr": "fp8e4nv", "v_ptr": "fp8e4nv", "k_cache_ptr": "fp8e4nv", "v_cache_ptr": "fp8e4nv"}
"""Element types of pointers to an 8-bit cache."""
FLOAT32 = dict.fromkeys(("out_ptr", "q_ptr", "k_ptr", "v_ptr"), "fp32")
"""Element types of pointers where the compute dtype is float32, whose products are exact: no tensor core has them."""
STEP_SIZES = ("num_rows", "num_tokens", "target", "table_width", "table_row")
"""Integers that differ from step to step: Triton must not compile anew where one of them is 1, or a multiple of 16."""
FLOATS = ("scale", "softcap", "eps", "offset", "q_eps", "k_eps", "q_offset", "k_offset", "v_scale", "k_inverse",
          "v_inverse")  # fmt: skip
"""Arguments that are numbers with a fraction."""
ALIGNED = ("out_ptr", "part_ptr", "q_ptr", "k_ptr", "v_ptr", "q_token", "out_token", "k_block", "k_slot", "k_head",
           "v_block", "v_slot", "v_head", "x_ptr", "weight_ptr", "residual_ptr", "x_row", "residual_row", "turned_ptr",
           "qkv_ptr", "qkv_row", "k_cache_ptr", "v_cache_ptr", "cos_ptr", "sin_ptr", "cos_row", "sin_row", "logits_ptr",
           "row_stride")  # fmt: skip
"""Arguments that are multiples of 16 when the engine launches: without that, loads are not 16 bytes wide."""


@dataclass(frozen=True, slots=True)
class Case:
    """One launch for one architecture.

    Attributes:
        constants: the kernel's compile-time arguments. types: of pointers, where they are not those of POINTERS.
        tensor_core: the instruction that must occur; None: the kernel multiplies no matrices.
    """

    arch: int
    name: str
    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    types: Mapping[str, str] = field(default_factory=dict)
    tensor_core: str | None = None


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


def cases(arch: int, *, quick: bool = False) -> Iterator[Case]:
    """Decode and prefill for the head sizes in use, plain and with features; then the smaller kernels."""
    capability = divmod(arch, 10)
    for head_dim in (128,) if quick else (64, 128, 256):
        tuning = tuning_for(capability, head_dim)
        yield attention(arch, f"decode D{head_dim}", tuning.decode, head_dim, split=True)
        yield attention(arch, f"prefill D{head_dim}", tuning.prefill, head_dim, split=False)
    tuning = tuning_for(capability, 128)
    features = {"WINDOW": 128, "SOFTCAP": True, "SINKS": True}
    if not quick:
        yield attention(arch, "decode D128 features", tuning.decode, 128, split=True, **features)
        yield attention(arch, "decode D128 ALiBi", tuning.decode, 128, split=True, ALIBI=True)
        yield attention(arch, "prefill D128 window sinks", tuning.prefill, 128, split=False, WINDOW=128, SINKS=True)
        yield attention(arch, "prefill D128 ALiBi", tuning.prefill, 128, split=False, ALIBI=True)
        for head_dim in (128, 256):
            tuning = tuning_for(capability, head_dim, 32, exact=True)
            yield attention(arch, f"decode D{head_dim} fp32", tuning.decode, head_dim, split=True, types=FLOAT32)
            yield attention(arch, f"prefill D{head_dim} fp32", tuning.prefill, head_dim, split=False, types=FLOAT32)
    if capability >= FIRST_WITH_FP8:
        tuning = tuning_for(capability, 128, 8)
        yield attention(arch, "decode D128 fp8", tuning.decode, 128, split=True, types=FP8)
        if not quick:
            yield attention(arch, "prefill D128 fp8", tuning.prefill, 128, split=False, types=FP8)
    yield from small_kernels(arch)


def attention(
    arch: int, name: str, launch: Launch, head_dim: int, *, split: bool, types: Mapping[str, str] | None = None,
    **features: Any,
) -> Case:  # fmt: skip
    """The attention kernel for 32 query heads and 8 KV heads."""
    constants = {
        "HEADS": 32, "GROUP": 4, "D": head_dim, "D_PAD": head_dim, "DV": head_dim, "DV_PAD": head_dim,
        "BLOCK_SIZE": 16, "BLOCK_M": launch.block_m, "TILE": launch.tile, "SPLIT": split, "WINDOW": 0,
        "SOFTCAP": False, "SINKS": False, "ALIBI": False, "PRECISION": "ieee" if types is FLOAT32 else "tf32",
        **features,
    }  # fmt: skip
    is_new = not split and launch.block_m >= 64
    wanted = TENSOR_CORE.get(arch, OLDER_TENSOR_CORE) if is_new else OLDER_TENSOR_CORE
    wanted = None if types is FLOAT32 else wanted
    return Case(arch, name, paged_attention_kernel, constants, launch.num_warps, launch.num_stages, types or {}, wanted)


def small_kernels(arch: int) -> Iterator[Case]:
    """What multiplies no matrices."""
    heads = {"HEADS": 32, "KV_HEADS": 8, "D": 128, "D_PAD": 128, "DV": 128, "DV_PAD": 128, "TILE": 8}
    prepare = {**heads, "HALF": 64, "NEOX": True, "Q_NORM": 1, "K_NORM": 1, "LARGEST": 0.0}
    sample = {"VOCAB": VOCAB_SIZE, "BLOCK": CudaSampler.block, "BLOCKS": num_blocks(VOCAB_SIZE, CudaSampler.block)}
    plan = {"DECODE_QUERIES": 4, "BLOCK_Q": 32, "TILE": 64, "MIN_TILES": 2, "WINDOW": 512, "ROWS": 256}
    yield Case(arch, "plan", plan_kernel, plan, 4)
    yield Case(arch, "combine", combine_kernel, {"HEADS": 32, "DV": 128, "DV_PAD": 128, "BLOCK_Q": 4}, 4)
    norm = {"SIZE": 4096, "BLOCK": 4096, "RESIDUAL": True, "OFFSET": False}
    yield Case(arch, "rms_norm", rms_norm_kernel, norm, 8)
    yield Case(arch, "gated_act", gated_act_kernel, {"SIZE": 14336, "BLOCK": 1024, "ACTIVATION": "silu"}, 4)
    yield Case(arch, "prepare_qkv", prepare_qkv_kernel, prepare, 4)
    if divmod(arch, 10) >= FIRST_WITH_FP8:
        yield Case(arch, "prepare_qkv fp8", prepare_qkv_kernel, prepare | {"LARGEST": 448.0}, 4, types=FP8)
    yield Case(arch, "sample", sample_kernel, sample, NUM_WARPS, types={"out_ptr": "i64"})


def compiled(case: Case) -> Any:
    """The kernel for the case's architecture."""
    names = case.kernel.arg_names
    widths = {param.name: param.annotation_type for param in case.kernel.params if param.annotation_type}

    def kind(name: str) -> str:
        if name in case.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return f"*{case.types.get(name) or POINTERS.get(name, 'bf16')}"
        return "fp32" if name in FLOATS else widths.get(name, "i32")

    source = ASTSource(
        case.kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def inspect(binary: Any, *, listed: bool) -> tuple[dict[str, int], str]:
    """(resources, disassembly) of a compiled kernel; the latter takes long, and is empty unless it is asked for.

    Without a stack nothing can be spilled; with one it is disassembled in any case.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump says no resources: {usage[-300:]}")
        values = dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))
        values["shared"] += binary.metadata.shared
        may_spill = values["stack"] + values["local"] > 0
        return values, _tool("nvdisasm", "-c", file.name) if listed or may_spill else ""


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=False).stdout


def check(case: Case) -> Found:
    """Compile one launch, and judge it."""
    found = Found(case.arch, case.name)
    anew = [param.name for param in case.kernel.params if param.name in STEP_SIZES and not param.do_not_specialize]
    if anew:
        found.problems.append(f"compiled anew while it serves, by {', '.join(anew)}")
    try:
        values, listing = inspect(compiled(case), listed=case.tensor_core is not None)
    except Exception as error:
        found.problems.append(_reason(error))
        return found
    found.registers, found.shared, found.stack = values["registers"], values["shared"], values["stack"]
    found.spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    allowed = 0 if is_gate() else MAX_SPILLS
    if found.shared > SHARED_KB[case.arch] * 1024:
        found.problems.append(f"{found.shared} bytes of shared memory; {SHARED_KB[case.arch]} KB are there")
    if found.spills > allowed:
        found.problems.append(f"{found.spills} spill instructions")
    if found.stack and is_gate():
        found.problems.append(f"{found.stack} bytes of stack")
    if case.tensor_core is not None:
        found.tensor_core = len(re.findall(rf"\b{case.tensor_core}\b", listing))
        if not found.tensor_core:
            found.problems.append(f"no {case.tensor_core}")
    return found


def is_gate() -> bool:
    """Whether this Triton is the one whose launches must not spill at all."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) == GATE


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line; Triton wraps it in listings of the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(map(str, SHARED_KB)), help="compute capabilities without the dot")
    parser.add_argument("--quick", action="store_true", help="one head size, without features")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    arguments = parser.parse_args()
    archs = [int(arch) for arch in arguments.arch.split(",")]
    if not arguments.json:
        gate = "" if is_gate() else f"; up to {MAX_SPILLS} spills are let pass, as it is not the gate"
        print(
            f"triton {triton.__version__}{gate}\n{'arch':7}{'launch':28}{'regs':>5}{'shared':>8}{'spills':>7}{'mma':>5}"
        )
    results = []
    for case in (case for arch in archs for case in cases(arch, quick=arguments.quick)):
        row = check(case)
        results.append(row)
        if not arguments.json:
            numbers = f"{row.registers:5}{row.shared:8}{row.spills:7}{row.tensor_core:5}"
            print(f"sm_{row.arch:<4}{row.name:28}{numbers}  {'; '.join(row.problems)}", flush=True)
    if arguments.json:
        launches = [asdict(result) for result in results]
        print(json.dumps({"triton": triton.__version__, "gate": is_gate(), "launches": launches}))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
