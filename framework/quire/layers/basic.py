"""Embedding, norm, output head and gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quire.contract.model import ModelInit
from quire.contract.ops import Activation, GatedActSpec, LinearSpec, RMSNormSpec
from quire.contract.quant import QuantTensor
from quire.layers.linear import Linear, Source
from quire.layers.weights import WeightTable

LARGE_TABLE = 64 * 1024 * 1024
"""Bytes from which on an embedding that is held twice is worth a read from the file per token."""


class Embedding:
    """Token ids int64 [T] -> [T, hidden_size], times a constant for families that scale it."""

    def __init__(self, init: ModelInit, table: WeightTable, name: str, vocab_size: int, hidden_size: int) -> None:
        self.weight = torch.empty(0)
        self._init = init
        self._name = f"{name}.weight"
        self._read_rows: Callable[[Tensor], Tensor] | None = None
        table.expect(self._name, (vocab_size, hidden_size), self._take)

    def __call__(self, input_ids: Tensor) -> Tensor:
        if self._read_rows is not None:
            return self._read_rows(input_ids).to(self._init.dtype)
        return functional.embedding(input_ids, self.weight)

    def keep_in_file(self) -> None:
        """Let go of the table where that saves much: a step needs a few rows, which the checkpoint's file has."""
        if self._init.device.type == "cpu" and self.weight.nbytes >= LARGE_TABLE:
            self._read_rows = self._init.stored_rows(self._name)
        if self._read_rows is not None:
            self.weight = torch.empty(0)

    def _take(self, tensor: Tensor) -> None:
        self.weight = tensor.to(self._init.device, self._init.dtype, copy=True)


class RMSNorm:
    """`(x [T, size], residual) -> (normed, new residual)`, by the op that serves the spec."""

    def __init__(
        self, init: ModelInit, table: WeightTable, name: str, size: int, eps: float, weight_offset: float = 0.0
    ) -> None:
        self._op = init.layers.op(RMSNormSpec(size, eps, init.dtype, weight_offset))
        self._init = init
        self.weight = torch.empty(0)
        table.expect(f"{name}.weight", (size,), self._take)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._op(x, self.weight, residual)
        return result

    def _take(self, tensor: Tensor) -> None:
        self.weight = tensor.to(self._init.device, self._init.dtype, copy=True)


class Head:
    """Hidden states -> logits [R, V] of the compute dtype.

    A tied head is the embedding's tensor, or what the op packs of it; a large embedding then stays in
    the checkpoint's file, so that nothing is held twice. A method that quantizes plain weights quantizes it too.
    """

    def __init__(
        self, init: ModelInit, table: WeightTable, embedding: Embedding, sizes: tuple[int, int], *, tied: bool
    ) -> None:
        vocab_size, hidden_size = sizes
        self._tied: Embedding | None = embedding if tied else None
        self._init = init
        self._spec = LinearSpec(hidden_size, vocab_size, False, init.dtype, init.deterministic, "lm_head")
        self._linear: Linear | None = None
        self._stored: Tensor | None = None
        if tied:
            # Some checkpoints store the tied head as well. Where it is not the embedding once more, it counts.
            table.expect("lm_head.weight", (vocab_size, hidden_size), self._keep, required=False)
        else:
            self._linear = Linear(init, table, [Source("lm_head", vocab_size)], hidden_size)

    def finalize(self) -> None:
        """Pack a tied head; the embedding has been loaded."""
        if self._tied is not None:
            same = self._stored is None or torch.equal(self._stored, self._tied.weight)
            weight = self._tied.weight if same or self._stored is None else self._stored
            self._stored = None
            self._multiply = self._packed(weight)
            self._tied.keep_in_file()

    def _packed(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        layers, spec, init = self._init.layers, self._spec, self._init
        quant = layers.quant_linear(spec, (spec,))
        if quant is not None and quant.tensors() == (
            QuantTensor("weight", tuple(weight.shape), init.dtype, out_dim=0),
        ):
            quantized, rounded = quant, quant.finalize({"weight": weight}, init.device)
            return lambda hidden: quantized.forward(hidden, rounded, None)
        op = layers.op(spec)
        state = op.pack(weight, None)
        return lambda hidden: op(hidden, state)

    def _keep(self, tensor: Tensor) -> None:
        self._stored = tensor.to(self._init.device, self._init.dtype, copy=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._linear is not None:
            return self._linear(hidden)
        return self._multiply(hidden)


class GatedMLP:
    """down(act(gate(x)) · up(x)), gate and up in one multiplication."""

    def __init__(
        self,
        init: ModelInit,
        table: WeightTable,
        gate_up: list[Source],
        down: str,
        sizes: tuple[int, int],
        activation: Activation,
        *,
        bias: bool = False,
    ) -> None:
        hidden_size, intermediate_size = sizes
        self._gate_up = Linear(init, table, gate_up, hidden_size, bias=bias)
        self._act = init.layers.op(GatedActSpec(intermediate_size, activation, init.dtype, init.deterministic))
        self._down = Linear(init, table, [Source(down, hidden_size)], intermediate_size, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act(self._gate_up(x)))
