"""Compiles the launches of the CUDA kernels for quantized weights for every GPU generation, without a GPU.

    python scripts/aot_quant.py [--arch 80,90] [--quick] [--json]

As `aot_check.py`, with the same gate. Besides: the inner loop of the kernel for few rows may have no more instructions
for each weight than MAX_PER_WEIGHT says, as it would not keep up with the memory; and on sm_90 the weight must be the
operand that the tensor cores take from registers. Exit code 1 if a launch is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from aot_check import MAX_SPILLS, OLDER_TENSOR_CORE, SHARED_KB, TENSOR_CORE, inspect, is_gate
from quire_quant.cuda_kernels import dequantize_kernel, few_rows_kernel, more_rows_kernel
from quire_quant.cuda_launches import BLOCK_N, Launch, launch_for
from quire_quant.float8_kernels import quantize_rows_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MAX_PER_WEIGHT = {(4, 128): 3.2, (4, 64): 3.8, (4, 32): 5.3, (8, 128): 3.8}
"""Bits, inputs to a scale -> instructions for each weight in the loop for up to 16 rows, on sm_90.

An H200 issues 3.3e13 instructions in a second and reads 7.6e12 weights of 4 bits, so more than 4 are too many there.
"""
POINTERS = {"words_ptr": "i32", "scales_ptr": "fp16", "zeros_ptr": "u8", "part_ptr": "fp32", "count_ptr": "i32"}
"""Element types of pointers; all others point to the compute dtype."""
ALIGNED = ("outputs", "inputs", "padded", "x_row")
"""Arguments that are multiples of 16 in the models in use, as all pointers are."""
WORD = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Case:
    """One launch for one architecture."""

    arch: int
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    dtype: str = "bf16"
    pointers: dict[str, str] = field(default_factory=lambda: POINTERS)

    @property
    def is_few(self) -> bool:
        """Whether the number of instructions matters."""
        return self.kernel is few_rows_kernel


@dataclass(slots=True)
class Found:
    """What the compiled launch needs, and what is wrong with it."""

    arch: int
    name: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    tensor_core: int = 0
    per_weight: float = 0.0
    problems: list[str] = field(default_factory=list)


def cases(archs: list[int], *, quick: bool) -> Iterator[Case]:
    """Every shape of the table for 4 and 8 bits, other groups and float16 besides; quick: one of each kernel."""
    for arch in archs:
        capability = divmod(arch, 10)
        for bits in (4,) if quick else (4, 8):
            for rows in (16, 65) if quick else (16, 32, 64, 65):
                yield product(arch, bits, 128, launch_for(rows, bits, capability))
        if quick:
            continue
        few, more = (launch_for(rows, 4, capability) for rows in (16, 65))
        for unit in (32, 64):
            yield product(arch, 4, unit, few)
            yield product(arch, 4, unit, more)
        for launch in (few, more):
            yield product(arch, 4, 128, launch, dtype="fp16")
            yield product(arch, 4, 128, launch, ragged=True)
            yield product(arch, 4, 128, launch, middle=True)
        for bits in (4, 8):
            yield Case(arch, f"dequantize {bits} bits", dequantize_kernel, weight_constants(bits, 128, "bf16"), 4, 3)
        if arch > 89:
            types = {"out_ptr": "fp8e4nv", "scale_ptr": "fp32"}
            for size, warps in ((128, 1), (4096, 8), (14336, 16)):
                block = {"SIZE": size, "BLOCK": triton.next_power_of_2(size)}
                yield Case(arch, f"round {size} to FP8", quantize_rows_kernel, block, warps, 3, pointers=types)


def weight_constants(bits: int, unit: int, dtype: str, *, middle: bool = False) -> dict[str, Any]:
    """Compile-time arguments that describe the weight."""
    offset = 0 if bits == 8 else 128 if dtype == "bf16" else 1024
    known = 1 << (bits - 1) if middle else -1
    return {"BITS": bits, "OFFSET": offset, "UNIT": unit, "MIDDLE": known, "NATIVE": True, "BLOCK_N": BLOCK_N}


def product(
    arch: int, bits: int, unit: int, launch: Launch, *, dtype: str = "bf16", ragged: bool = False, middle: bool = False
) -> Case:
    """A product, its inputs split among programs, with a bias."""
    constants = weight_constants(bits, unit, dtype, middle=middle)
    constants |= {"BIAS": True, "RAGGED": ragged, "SPLIT": 4, "BLOCK_M": launch.block_m}
    extras = [text for text, given in (("fp16", dtype == "fp16"), ("ragged", ragged), ("middle", middle)) if given]
    name = " ".join([f"{'few' if launch.few else 'more'} {launch.block_m} rows, {bits} bits by {unit}", *extras])
    kernel = few_rows_kernel if launch.few else more_rows_kernel
    if not launch.few:
        constants["WIDE"] = launch.wide
    return Case(arch, name, kernel, constants, launch.num_warps, launch.num_stages, dtype)


def compiled(case: Case) -> Any:
    """The kernel for the case's architecture."""
    names = case.kernel.arg_names

    def kind(name: str) -> str:
        if name in case.constants:
            return "constexpr"
        return f"*{case.pointers.get(name, case.dtype)}" if name.endswith("_ptr") else "i32"

    source = ASTSource(
        case.kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n in ALIGNED},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def loop_length(listing: str) -> int:
    """Instructions of the smallest loop that multiplies matrices; 0: there is none.

    In the disassembly a loop is what lies between a label and a later branch to it.
    """
    starts = {match.group(1): match.start() for match in LABEL.finditer(listing)}
    lengths = []
    for branch in re.finditer(r"\bBRA[^;]*\((\.L_x_\d+)\)", listing):
        start = starts.get(branch.group(1), len(listing))
        body = listing[start : branch.end() + 1]
        if start < branch.start() and re.search(r"\b(?:H|HG|UTCH)MMA\b", body):
            lengths.append(len(WORD.findall(body)))
    return min(lengths, default=0)


def check(case: Case) -> Found:
    """Compile one launch, and judge it."""
    found = Found(case.arch, case.name)
    try:
        binary = compiled(case)
        values, listing = inspect(binary, listed=True)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        found.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return found
    found.registers, found.shared = values["registers"], values["shared"]
    found.spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    if found.shared > SHARED_KB[case.arch] * 1024:
        found.problems.append(f"{found.shared} bytes of shared memory; {SHARED_KB[case.arch]} KB are there")
    if found.spills > (0 if is_gate() else MAX_SPILLS):
        found.problems.append(f"{found.spills} spill instructions")
    if values["stack"] and is_gate():
        found.problems.append(f"{values['stack']} bytes of stack")
    if case.kernel in (few_rows_kernel, more_rows_kernel):
        judge_product(case, binary, listing, found)
    return found


def judge_product(case: Case, binary: Any, listing: str, found: Found) -> None:
    """What is asked of products beyond that they fit."""
    wanted = OLDER_TENSOR_CORE if case.is_few else TENSOR_CORE.get(case.arch, OLDER_TENSOR_CORE)
    found.tensor_core = len(re.findall(rf"\b{wanted}\b", listing))
    if not found.tensor_core:
        found.problems.append(f"no {wanted}")
    weights = 128 * BLOCK_N / (32 * case.num_warps)
    found.per_weight = round(loop_length(listing) / weights, 2)
    limit = MAX_PER_WEIGHT[case.constants["BITS"], case.constants["UNIT"]]
    plain = case.constants["BLOCK_M"] == 16 and not case.constants["RAGGED"]
    if case.is_few and plain and case.arch == 90 and not 0 < found.per_weight <= limit:
        found.problems.append(f"{found.per_weight} instructions for each weight; {limit} are allowed")
    if not case.is_few and case.arch == 90:
        products = re.findall(r"wgmma\.mma_async[^;]*;", binary.asm["ptx"], re.DOTALL)
        # operands: {sums}, {registers of the weight}, descriptor of x in shared memory
        from_registers = [text for text in products if re.search(r"\},\s*\{", text)]
        if len(from_registers) != len(products) or not products:
            found.problems.append(f"{len(from_registers)} of {len(products)} products take the weight from registers")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(map(str, SHARED_KB)), help="compute capabilities without the dot")
    parser.add_argument("--quick", action="store_true", help="one launch of each kernel for products")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    arguments = parser.parse_args()
    archs = [int(arch) for arch in arguments.arch.split(",")]
    if not arguments.json:
        gate = "" if is_gate() else f"; up to {MAX_SPILLS} spills are let pass, as it is not the gate"
        head = f"{'regs':>5}{'shared':>8}{'spills':>7}{'mma':>5}{'per weight':>11}"
        print(f"triton {triton.__version__}{gate}\n{'arch':7}{'launch':42}{head}")
    results = []
    for case in cases(archs, quick=arguments.quick):
        row = check(case)
        results.append(row)
        if not arguments.json:
            numbers = f"{row.registers:5}{row.shared:8}{row.spills:7}{row.tensor_core:5}{row.per_weight:11.2f}"
            print(f"sm_{row.arch:<4}{row.name:42}{numbers}  {'; '.join(row.problems)}", flush=True)
    if arguments.json:
        launches = [asdict(result) for result in results]
        print(json.dumps({"triton": triton.__version__, "gate": is_gate(), "launches": launches}))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
