"""Sparse experts behind a router, read expert by expert or already stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.contract.model import ModelInit
from quire.contract.ops import Activation, LinearSpec, MoESpec, mixture
from quire.layers.basic import GatedMLP
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


def sparse_mlp(
    init: ModelInit, table: WeightTable, names: ExpertNames, sizes: ExpertSizes
) -> SparseMLP | QuantizedSparseMLP:
    """The form of an expert layer that the checkpoint and the quantization ask for."""
    gates = (
        LinearSpec(sizes.hidden_size, sizes.intermediate_size, False, init.dtype, init.deterministic, path)
        for path in (names.gate.format(e=expert) for expert in range(sizes.num_experts))
    )
    quantized = any(init.layers.quantizes(gate) for gate in gates)
    return (QuantizedSparseMLP if quantized else SparseMLP)(init, table, names, sizes)


class SparseMLP:
    """A mixture of gated experts, whose weights stand in two stacks for an operation that takes them all."""

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
        for projection, target in (("gate_up_proj", self._gate_up), ("down_proj", self._down)):
            slices = dict(_slices(names, sizes, projection, target))
            for name, part in slices.items():
                table.expect(name, tuple(part.shape), _copier(part))
            table.expect(
                f"{names.stacked}.{projection}",
                tuple(target.shape),
                _copier(target),
                required=False,
                replaces=list(slices),
            )

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._op(x, self._router(x), self._gate_up, self._down)
        return result


class QuantizedSparseMLP:
    """A mixture of gated experts, each of which is multiplied in its own quantized form.

    A method that quantizes when it loads may be given stacks; they are handed on expert by expert. Not for captured
    graphs, as the host chooses which experts to run.
    """

    def __init__(self, init: ModelInit, table: WeightTable, names: ExpertNames, sizes: ExpertSizes) -> None:
        experts, inner, hidden = sizes.num_experts, sizes.intermediate_size, sizes.hidden_size
        self._sizes = sizes
        self._router = Linear(init, table, [Source(names.router, experts)], hidden)
        self._experts = []
        for expert in range(experts):
            gate_up = [Source(name.format(e=expert), inner) for name in (names.gate, names.up)]
            down = names.down.format(e=expert)
            self._experts.append(GatedMLP(init, table, gate_up, down, (hidden, inner), sizes.activation))
        for projection, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):

            def take(stack: Tensor, projection: str = projection) -> None:
                for name, part in _slices(names, sizes, projection, stack):
                    table.load(name, part)

            table.expect(f"{names.stacked}.{projection}", (experts, *shape), take, required=False)

    def __call__(self, x: Tensor) -> Tensor:
        sizes = self._sizes
        logits = self._router(x)
        return mixture(
            x, logits, sizes.top_k, renormalize=sizes.renormalize, expert=lambda e, rows: self._experts[e](rows)
        )


def _slices(names: ExpertNames, sizes: ExpertSizes, projection: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name of a single weight, where it stands in the stack) for each expert."""
    inner = sizes.intermediate_size
    for expert, part in enumerate(stack):
        if projection == "down_proj":
            yield f"{names.down.format(e=expert)}.weight", part
        else:
            yield f"{names.gate.format(e=expert)}.weight", part[:inner]
            yield f"{names.up.format(e=expert)}.weight", part[inner:]


def _copier(target: Tensor) -> Callable[[Tensor], None]:
    def take(tensor: Tensor) -> None:
        target.copy_(tensor)

    return take
