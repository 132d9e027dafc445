"""Codes of 1 to 8 bits in int32 words: one little-endian stream of bits, least significant first.

GPTQ's and compressed-tensors' packing are both this stream; AWQ differs by the order of columns alone.
32 codes fill `bits` words exactly, so the stream repeats with that period and is read column by column of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
PERIOD = 32
"""Codes after which the stream is aligned to a word again, whatever the bits."""


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, C] -> uint8 [count, C]: the first `count` codes of each column's stream."""
    rows, columns = words.shape
    periods = -(-rows // bits)
    padded = words.new_zeros(periods * bits, columns)
    padded[:rows] = words
    stream = padded.view(periods, bits, columns)
    codes = torch.empty(periods, PERIOD, columns, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for index in range(PERIOD):
        word, shift = divmod(index * bits, WORD)
        value = stream[:, word] >> shift
        left = WORD - shift
        if left < bits:  # the rest stands in the next word; the shift has filled the gap with the sign
            value = (value & ((1 << left) - 1)) | (stream[:, word + 1] << left)
        codes[:, index] = (value & mask).to(torch.uint8)
    return codes.view(-1, columns)[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [count, C] below 2**bits -> int32 [ceil(count * bits / 32), C]."""
    count, columns = codes.shape
    periods = -(-count // PERIOD)
    padded = torch.zeros(periods * PERIOD, columns, dtype=torch.int64, device=codes.device)
    padded[:count] = codes
    source = padded.view(periods, PERIOD, columns)
    words = torch.zeros(periods, bits, columns, dtype=torch.int64, device=codes.device)
    for index in range(PERIOD):
        word, shift = divmod(index * bits, WORD)
        words[:, word] |= source[:, index] << shift
        if WORD - shift < bits:
            words[:, word + 1] |= source[:, index] >> (WORD - shift)
    signed = words & 0xFFFFFFFF
    signed = torch.where(signed >= 1 << 31, signed - (1 << 32), signed).to(torch.int32)
    return signed.view(-1, columns)[: -(-count * bits // WORD)]
