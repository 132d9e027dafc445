"""In what shape the kernels of `cuda_kernels` are launched: a table, so that nothing is tuned while a server runs.

The values compile without spilling for every listed generation (`scripts/aot_quant.py`); they are to be refined
by measurements (`benchmarks/cuda_quant.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = 32
"""Rows up to which codes are multiplied as they are; reading the weight is then all the time there is."""
FUSED_ROWS = 1024
"""Rows above which the weight is better written to memory, once, for cuBLAS."""
BLOCK_N = 128
"""Outputs of one program."""
SPLIT_TILES = 4
"""Tiles of inputs that a program has at least, when they are split."""
MAX_SPLIT = 16
MIN_BLOCK_M = 64
"""Rows of a program where there may be several programs for the rows: what counters are allocated for."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Shape of one program.

    Attributes:
        few: by `few_rows_kernel`, else by `more_rows_kernel`.
        block_m: rows. num_warps: of 32 threads. num_stages: tiles in flight, and one.
        wide: see `more_rows_kernel`.
        waves: programs per multiprocessor that splitting aims at.
    """

    few: bool
    block_m: int
    num_warps: int
    num_stages: int
    wide: bool = False
    waves: int = 2


def launch_for(rows: int, bits: int, capability: tuple[int, int]) -> Launch:
    """The table, for up to FUSED_ROWS rows of x.

    Args:
        bits: 4 or 8, as in `Words`. capability: compute capability, such as (9, 0).
    """
    if rows <= FEW_ROWS:
        return Launch(True, 16 if rows <= 16 else 32, 4, 4 if bits == 4 else 3)
    small_shared_memory = capability in ((8, 6), (8, 9)) or capability[0] == 12  # 99 KB instead of 163 or 227
    # Blackwell's tensor cores have products over 64 inputs at least; Hopper's wait less often for them.
    wide = capability[0] in (10, 11) or (capability[0] == 9 and bits == 4)
    if rows <= MIN_BLOCK_M:
        return Launch(False, MIN_BLOCK_M, 4, 2 if small_shared_memory else 3, wide)
    return Launch(False, 128, 8, 2 if small_shared_memory else 3, wide, waves=1)


def split_for(launch: Launch, rows: int, output_tiles: int, input_tiles: int, num_multiprocessors: int) -> int:
    """Programs among which the inputs are split: a power of two, so many that all multiprocessors have work."""
    programs = output_tiles * -(-rows // launch.block_m)
    split = 1
    while (
        programs * split < launch.waves * num_multiprocessors
        and split < MAX_SPLIT
        and input_tiles >= 2 * split * SPLIT_TILES
    ):
        split *= 2
    return split
