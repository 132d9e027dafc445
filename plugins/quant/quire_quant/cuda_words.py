"""Codes in the order in which the CUDA kernels read them. Plain torch; nothing here needs a GPU or Triton.

Inputs come in tiles of 128, and those in four segments of 32. A word has one row r of each segment:

    4 bits  nibble i + 4h of word (t, r)   is input 128 t + 32 i + 16 h + r, r < 16
    8 bits  byte   i      of word (t, r)   is input 128 t + 32 i + r,        r < 32

so that shifting a tile of words gives slices of consecutive inputs, and one instruction takes the codes of
both halves of a segment out of a word: nibbles i and i + 4 lie 16 bits apart. Words of one row lie side by
side for all outputs, [K / 8 or K / 4, N]. Both sizes are padded to whole tiles, by codes whose scale is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 128
"""Inputs, and outputs, that sizes are padded to a multiple of."""
SEGMENT = 32
"""Inputs that must share a scale."""
HALF = SEGMENT // 2


@dataclass(frozen=True, slots=True)
class Words:
    """A layer as the kernels hold it.

    Attributes:
        data: int32 [K / 8 or K / 4, N], padded. bits: 4 or 8 for each code.
        scales: [K / unit, N], padded. zeros: uint8, as scales; None: all are `middle`.
        unit: 32, 64 or 128 inputs to a row of scales.
        in_features, out_features: K and N without padding.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    unit: int
    middle: int
    in_features: int
    out_features: int

    @property
    def num_tiles(self) -> int:
        """Tiles of inputs."""
        return self.data.shape[0] * 32 // self.bits // TILE

    @property
    def padded_outputs(self) -> int:
        """N, padded."""
        return self.data.shape[1]


def unit_of(group_size: int, in_features: int) -> int | None:
    """Inputs to a row of scales: the largest part of a tile that no group begins or ends within; None: too small."""
    if group_size >= in_features:
        return TILE
    return next((unit for unit in (TILE, TILE // 2, SEGMENT) if group_size % unit == 0), None)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Words:
    """Codes below 2**bits -> words.

    Args:
        codes: uint8 [N, K]. scales: [N, G]. zeros: whole numbers below 256 [N, G], or None: all are 2**(bits - 1).
        group_size: one for which `unit_of` has an answer.
    """
    outputs, inputs = codes.shape
    unit = unit_of(group_size, inputs)
    if unit is None:
        raise ValueError(f"groups of {group_size} inputs are no multiple of {SEGMENT}")
    more = (0, -inputs % TILE, 0, -outputs % TILE)
    data = (_pack4 if bits <= 4 else _pack8)(pad(codes, more).t())
    first = torch.arange(0, inputs + more[1], unit, device=codes.device)
    group = (first // group_size).clamp(max=scales.shape[1] - 1)

    def spread(values: Tensor) -> Tensor:
        return pad(values[:, group].t(), (0, more[3])).contiguous()

    return Words(
        data=data,
        scales=spread(_narrow(scales)),
        zeros=None if zeros is None else spread(zeros.to(torch.uint8)),
        bits=4 if bits <= 4 else 8,
        unit=unit,
        middle=1 << (bits - 1),
        in_features=inputs,
        out_features=outputs,
    )


def _pack4(codes: Tensor) -> Tensor:
    """uint8 [K, N] -> int32 [K / 8, N]."""
    halves = codes.view(-1, TILE // SEGMENT, 2, HALF, codes.shape[1])  # tile, segment, half, row, output
    words = torch.zeros(halves.shape[0], HALF, codes.shape[1], dtype=torch.int32, device=codes.device)
    for segment in range(halves.shape[1]):
        for half in range(2):
            words |= halves[:, segment, half].int() << (4 * (segment + 4 * half))
    return words.view(-1, codes.shape[1])


def _pack8(codes: Tensor) -> Tensor:
    """uint8 [K, N] -> int32 [K / 4, N]."""
    segments = codes.view(-1, TILE // SEGMENT, SEGMENT, codes.shape[1])
    words = torch.zeros(segments.shape[0], SEGMENT, codes.shape[1], dtype=torch.int32, device=codes.device)
    for segment in range(segments.shape[1]):
        words |= segments[:, segment].int() << (8 * segment)
    return words.view(-1, codes.shape[1])


def _narrow(scales: Tensor) -> Tensor:
    """Scales in 16 bits, if that loses nothing; most checkpoints store them so."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales
