"""Linear layers whose weight may be several of the checkpoint's, fused along the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quire.contract.model import ModelInit
from quire.contract.ops import LinearSpec
from quire.contract.quant import QuantLinear, QuantTensor
from quire.errors import UnsupportedModel
from quire.layers.weights import WeightTable


@dataclass(frozen=True, slots=True)
class Source:
    """One of the checkpoint's linear layers: its path, and its output features."""

    name: str
    out_features: int


class Linear:
    """y = x · Wᵀ + b, W being the sources' weights one below the other.

    Sources that may not be fused, as their quantized forms differ, are multiplied one by one.

    Packed as soon as the last of its tensors has arrived, so that loading needs the unpacked form of
    one layer at a time.
    """

    def __init__(
        self, init: ModelInit, table: WeightTable, sources: Sequence[Source], in_features: int, *, bias: bool = False
    ) -> None:
        out_features = sum(source.out_features for source in sources)
        name = sources[0].name if len(sources) == 1 else "+".join(source.name for source in sources)
        self.spec = LinearSpec(in_features, out_features, bias, init.dtype, init.deterministic, name)
        parts = tuple(replace(self.spec, out_features=s.out_features, name=s.name) for s in sources)
        fused = len(parts) == 1 or init.layers.may_fuse(parts)
        groups = [(self.spec, parts)] if fused else [(part, (part,)) for part in parts]
        self._runs: list[Callable[[Tensor], Tensor]] = [self._unloaded] * len(groups)
        for index, (spec, members) in enumerate(groups):
            quant = init.layers.quant_linear(spec, members)
            loader = _PlainLoader(init, spec, members) if quant is None else _QuantLoader(init, quant, members)
            loader.expect(table, partial(self._runs.__setitem__, index))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""
        runs = self._runs
        return runs[0](x) if len(runs) == 1 else torch.cat([run(x) for run in runs], -1)

    def _unloaded(self, x: Tensor) -> Tensor:
        raise AssertionError(f"{self.spec.name} was not loaded")


Ready = Callable[[Callable[[Tensor], Tensor]], None]


class _PlainLoader:
    """Collects weight and bias of an unquantized layer."""

    def __init__(self, init: ModelInit, spec: LinearSpec, parts: Sequence[LinearSpec]) -> None:
        self._init, self._spec, self._parts = init, spec, parts
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._left = len(parts) * (2 if spec.bias else 1)

    def expect(self, table: WeightTable, ready: Ready) -> None:
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.out_features)
            start += part.out_features
            shape = (part.out_features, part.in_features)
            table.expect(f"{part.name}.weight", shape, self._taker(rows, ready, is_bias=False))
            if part.bias:
                table.expect(f"{part.name}.bias", shape[:1], self._taker(rows, ready, is_bias=True))

    def _taker(self, rows: slice, ready: Ready, *, is_bias: bool) -> Callable[[Tensor], None]:
        def take(tensor: Tensor) -> None:
            self._buffer(is_bias)[rows].copy_(tensor)
            self._left -= 1
            if self._left == 0:
                self._pack(ready)

        return take

    def _buffer(self, is_bias: bool) -> Tensor:
        spec, init = self._spec, self._init
        if is_bias:
            if self._bias is None:
                self._bias = torch.empty(spec.out_features, dtype=init.dtype, device=init.device)
            return self._bias
        if self._weight is None:
            self._weight = torch.empty(spec.out_features, spec.in_features, dtype=init.dtype, device=init.device)
        return self._weight

    def _pack(self, ready: Ready) -> None:
        op = self._init.layers.op(self._spec)
        state = op.pack(self._weight, self._bias)
        self._weight = self._bias = None
        ready(lambda x: op(x, state))


class _QuantLoader:
    """Collects a quantized layer's tensors from each of its sources."""

    def __init__(self, init: ModelInit, quant: QuantLinear, parts: Sequence[LinearSpec]) -> None:
        self._init, self._quant, self._parts = init, quant, parts
        self._found: dict[str, dict[int, Tensor]] = {}
        self._biases: dict[int, Tensor] = {}
        self._wanted = quant.tensors()
        self._left = len(parts) * (len(self._wanted) + quant.spec.bias)
        self._done = False

    def expect(self, table: WeightTable, ready: Ready) -> None:
        # Optional tensors may come last, or never; then the layer is finished with what is there.
        table.at_end(lambda: self._finalize(ready))
        for index, part in enumerate(self._parts):
            for tensor in self._wanted:
                free = tensor.out_dim if len(self._parts) > 1 else None
                shape = tuple(None if dim == free else size for dim, size in enumerate(tensor.shape))
                take = self._taker(self._found.setdefault(tensor.name, {}), index, ready)
                table.expect(f"{part.name}.{tensor.name}", shape, take, required=tensor.required)
            if part.bias:
                take = self._taker(self._biases, index, ready)
                table.expect(f"{part.name}.bias", (part.out_features,), take)

    def _taker(self, into: dict[int, Tensor], index: int, ready: Ready) -> Callable[[Tensor], None]:
        def take(tensor: Tensor) -> None:
            into[index] = tensor.clone()
            self._left -= 1
            if self._left == 0:
                self._finalize(ready)

        return take

    def _finalize(self, ready: Ready) -> None:
        if self._done:
            return
        self._done = True
        tensors = {
            tensor.name: self._join(tensor, self._found[tensor.name])
            for tensor in self._wanted
            if self._found[tensor.name]
        }
        bias = None
        if self._biases:
            joined = torch.cat([self._biases[index] for index in range(len(self._parts))])
            bias = joined.to(self._init.device, self._init.dtype)
        # In place: what takes the tensors lives as long as the model, and would keep them.
        for taken in (*self._found.values(), self._biases):
            taken.clear()
        quant = self._quant
        state: Any = quant.finalize(tensors, self._init.device)
        ready(lambda x: quant.forward(x, state, bias))

    def _join(self, tensor: QuantTensor, found: dict[int, Tensor]) -> Tensor:
        if len(found) < len(self._parts):
            lacking = [part.name for index, part in enumerate(self._parts) if index not in found]
            raise UnsupportedModel(f"{self._quant.spec.name} is fused, and {lacking[0]!r} lacks {tensor.name!r}")
        pieces = [found[index] for index in sorted(found)]
        if len(pieces) == 1:
            return pieces[0]
        if tensor.out_dim is not None:
            return torch.stack(pieces) if not pieces[0].ndim else torch.cat(pieces, tensor.out_dim)
        if not all(torch.equal(piece, pieces[0]) for piece in pieces):
            raise UnsupportedModel(f"{tensor.name!r} differs among the layers that are fused: {self._quant.spec.name}")
        return pieces[0]
