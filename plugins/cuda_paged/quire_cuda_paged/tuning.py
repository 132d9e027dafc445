"""How each kernel is launched, by GPU generation: a table, so that nothing is tuned while a server runs.

The starting values compile without spilling for every listed architecture; `tests/cuda_paged` checks
that. They are to be refined by measurements on each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """Shape of one program.

    Attributes:
        block_m: query rows (tokens times the heads of a group). tile: KV positions per turn of the loop.
        num_warps: of 32 threads. num_stages: tiles in flight, and one.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """The two shapes in which the kernel is compiled, and how finely decode work is split.

    Attributes:
        decode: few query tokens per row, split over KV. prefill: many.
        waves: programs per multiprocessor that splitting aims at.
    """

    decode: Launch
    prefill: Launch
    waves: int = 2


WIDE = 128
"""Head sizes above this need smaller tiles to fit into shared memory and registers."""


def tuning_for(capability: tuple[int, int], head_dim: int, kv_bits: int = 16, *, exact: bool = False) -> Tuning:
    """The table.

    Args:
        capability: compute capability, such as (9, 0). head_dim: the larger of the q and v head sizes, padded.
        kv_bits: of an element of the cache; the tiles of an 8-bit one take half the room.
        exact: the compute dtype is float32, which no tensor core multiplies: larger tiles than these spill by the
            thousand, and take minutes to compile.
    """
    if exact:
        launch = Launch(16, 16, 8 if head_dim > WIDE else 4, 2)
        return Tuning(launch, launch)
    major, minor = capability
    small_shared_memory = (major, minor) in ((8, 6), (8, 9)) or major == 12  # 99 KB instead of 163 or 227
    if head_dim > WIDE:
        return Tuning(Launch(16, 32, 4, 2), Launch(128 if major == 10 else 64, 32, 8, 2))
    if small_shared_memory:
        decode = Launch(16, 32, 4, 3) if head_dim <= WIDE // 2 else Launch(16, 64, 4, 2)
        return Tuning(decode if kv_bits > 8 else Launch(16, 64, 8, 3), Launch(64, 32, 4, 3))
    if major == 8:
        return Tuning(Launch(16, 32, 4, 4), Launch(128, 32, 8, 3))
    return Tuning(Launch(16, 64, 4, 3) if kv_bits > 8 else Launch(16, 64, 8, 4), Launch(128, 64, 8, 3))
