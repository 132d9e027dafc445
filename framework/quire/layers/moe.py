"""Sparse experts: a router and stacked expert weights, read expert by expert or already stacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.contract.model import ModelInit
from quire.contract.ops import Activation, MoESpec
from quire.layers.linear import Linear, Source
from quire.layers.weights import WeightTable


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint paths: the router, and of each expert (`{e}` stands for its number) gate, up and down.

    `stacked`: the block whose `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] hold all experts, as
    transformers 5 stores them in its own format.
    """

    router: str
    gate: str
    up: str
    down: str
    stacked: str


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Sizes and routing of an expert layer; see `MoESpec`."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    renormalize: bool
    activation: Activation


class SparseMLP:
    """A mixture of gated experts."""

    def __init__(self, init: ModelInit, table: WeightTable, names: ExpertNames, sizes: ExpertSizes) -> None:
        experts, inner, hidden = sizes.num_experts, sizes.intermediate_size, sizes.hidden_size
        self._router = Linear(init, table, [Source(names.router, experts)], hidden)
        self._op = init.layers.op(
            MoESpec(
                num_experts=experts,
                top_k=sizes.top_k,
                hidden_size=hidden,
                intermediate_size=inner,
                renormalize=sizes.renormalize,
                activation=sizes.activation,
                dtype=init.dtype,
                deterministic=init.deterministic,
            )
        )
        self._gate_up = torch.empty(experts, 2 * inner, hidden, dtype=init.dtype, device=init.device)
        self._down = torch.empty(experts, hidden, inner, dtype=init.dtype, device=init.device)
        for projection, target, parts in (
            ("gate_up_proj", self._gate_up, (names.gate, names.up)),
            ("down_proj", self._down, (names.down,)),
        ):
            single = [f"{part.format(e=expert)}.weight" for part in parts for expert in range(experts)]
            table.expect(
                f"{names.stacked}.{projection}", tuple(target.shape), _copier(target), required=False, replaces=single
            )
        for expert in range(experts):
            gate_up, down = self._gate_up[expert], self._down[expert]
            for name, shape, target in (
                (names.gate, (inner, hidden), gate_up[:inner]),
                (names.up, (inner, hidden), gate_up[inner:]),
                (names.down, (hidden, inner), down),
            ):
                table.expect(f"{name.format(e=expert)}.weight", shape, _copier(target))

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._op(x, self._router(x), self._gate_up, self._down)
        return result


def _copier(target: Tensor) -> Callable[[Tensor], None]:
    def take(tensor: Tensor) -> None:
        target.copy_(tensor)

    return take
