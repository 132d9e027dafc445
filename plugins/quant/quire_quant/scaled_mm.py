"""Where `torch._scaled_mm` can multiply FP8 weights by activations that are rounded to FP8 as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quire.plugin import LinearSpec

BLOCK = (128, 128)
"""Outputs and inputs of a weight that share a scale, in the only such form that the product has."""
BLOCK_ROWS = 4
"""cuBLAS reads scales of blocks along the inputs as if their number were a multiple of this."""
ALIGNMENT = 16
OLDEST = (8, 9)
"""Compute capability of the oldest GPU whose tensor cores multiply in FP8."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides whether a GPU can: its compute capability, and torch's CUDA version."""

    capability: tuple[int, int]
    cuda: tuple[int, int]


def facts_of(device: torch.device) -> Facts | None:
    """The device's, or None: it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = map(int, torch.version.cuda.split(".")[:2])
    return Facts(torch.cuda.get_device_capability(device), (major, minor))


def why_not(spec: LinearSpec, block: tuple[int, int] | None, facts: Facts | None) -> list[str]:
    """Reasons why a layer's weight has to be dequantized instead; empty: it can be multiplied as it is.

    Args:
        block: outputs and inputs that share a scale; None: each output has its own.
    """
    if facts is None:
        return ["the device is no NVIDIA GPU"]
    reasons = []
    capability, cuda = (".".join(map(str, pair)) for pair in (facts.capability, facts.cuda))
    if facts.capability < OLDEST:
        reasons.append(f"the GPU has compute capability {capability}; {'.'.join(map(str, OLDEST))} is needed")
    if spec.deterministic:
        reasons.append("in its products a row's bits depend on how many rows there are")
    if spec.dtype is not torch.bfloat16:
        reasons.append(f"the compute dtype is {str(spec.dtype).removeprefix('torch.')}; bfloat16 is needed")
    least = (ALIGNMENT, ALIGNMENT)
    if block is not None:
        least = (BLOCK[0], BLOCK_ROWS * BLOCK[1])
        if facts.capability[0] != 9:
            reasons.append(f"the GPU has compute capability {capability}; scales by block need 9.0")
        if facts.cuda < (12, 9):
            reasons.append(f"torch was built for CUDA {cuda}; scales by block need 12.9")
        if block != BLOCK:
            reasons.append(f"blocks are {list(block)}; they must be {list(BLOCK)}")
    if spec.out_features % least[0] or spec.in_features % least[1]:
        reasons.append(
            f"{spec.out_features} outputs and {spec.in_features} inputs are no multiples of {least[0]} and {least[1]}"
        )
    return reasons
