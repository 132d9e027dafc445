"""The one form that every integer format is decoded to, and every operation packs from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from quire.plugin import LinearSpec, QuantLinearSpec
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer's codes look like, known before any tensor is read.

    Attributes:
        bits: per code. group_size: inputs that share a scale; the layer's inputs for one scale per output.
        input_bits: as in `QuantLinearSpec`.
    """

    bits: int
    group_size: int
    input_bits: Literal[8, 16] = 16

    def spec(self, layer: LinearSpec, *, has_zeros: bool) -> QuantLinearSpec:
        """The operation that multiplies by such codes of a layer."""
        return QuantLinearSpec(
            in_features=layer.in_features,
            out_features=layer.out_features,
            bits=self.bits,
            group_size=self.group_size,
            zeros="integer" if has_zeros else "middle",
            dtype=layer.dtype,
            deterministic=layer.deterministic,
            name=layer.name,
            input_bits=self.input_bits,
        )


@dataclass(frozen=True, slots=True)
class Codes:
    """W[n, perm[k]] = (codes[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size].

    Attributes:
        codes: uint8 [N, K], below 2**bits.
        scales: [N, G], in the checkpoint's dtype. G is ceil(K / group_size).
        zeros: uint8 [N, G]; None: 2**(bits - 1) everywhere.
        perm: int64 [K], the input that each column belongs to, where groups are not runs of inputs; or None.
    """

    form: Form
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None

    @property
    def float_zeros(self) -> Tensor | None:
        """Zeros as float32 [N, G]."""
        return None if self.zeros is None else self.zeros.float()

    def spec(self, layer: LinearSpec) -> QuantLinearSpec:
        """The operation that multiplies by them, in a layer that has these outputs among others."""
        return self.form.spec(replace(layer, out_features=len(self.codes)), has_zeros=self.zeros is not None)

    def to(self, device: torch.device) -> Codes:
        """The same on a device."""
        moved = [None if t is None else t.to(device) for t in (self.zeros, self.perm)]
        return Codes(self.form, self.codes.to(device), self.scales.to(device), *moved)

    def rows(self, start: int, end: int) -> Codes:
        """The form of some of the outputs."""
        zeros = None if self.zeros is None else self.zeros[start:end]
        return Codes(self.form, self.codes[start:end], self.scales[start:end], zeros, self.perm)


def per_column(grouped: Tensor, group_size: int, columns: int) -> Tensor:
    """[N, G] -> [N, columns]: each column's value; the last group may be cut short."""
    return grouped.repeat_interleave(group_size, 1)[:, :columns]


def weight_of(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(codes - zeros) * scales in float32: codes [N, K], scales and zeros float32 [N, G] -> [N, K]."""
    rows, columns = codes.shape
    if columns % group_size:
        spread = [per_column(each, group_size, columns) for each in (zeros, scales)]
        return (codes.float() - spread[0]) * spread[1]
    grouped = codes.view(rows, -1, group_size).float()
    return ((grouped - zeros[..., None]) * scales[..., None]).view(rows, columns)
