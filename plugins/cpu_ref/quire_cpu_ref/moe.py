"""Mixture of experts: each expert is run once over the tokens that are routed to it."""

from __future__ import annotations

from quire.plugin import GatedActSpec, LinearSpec, MoESpec, mixture
from torch import Tensor

from quire_cpu_ref.linear import DeterministicLinear, LinearState, TorchLinear
from quire_cpu_ref.pointwise import TorchGatedAct


class TorchMoE:
    """`MoEOp` in plain torch."""

    def __init__(self, spec: MoESpec) -> None:
        self.spec = spec
        linear = DeterministicLinear if spec.deterministic else TorchLinear
        size, inner = spec.hidden_size, spec.intermediate_size
        self._up = linear(LinearSpec(size, 2 * inner, False, spec.dtype, spec.deterministic))
        self._down = linear(LinearSpec(inner, size, False, spec.dtype, spec.deterministic))
        self._act = TorchGatedAct(GatedActSpec(inner, spec.activation, spec.dtype, spec.deterministic))

    def __call__(self, x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        def expert(number: int, rows: Tensor) -> Tensor:
            hidden = self._act(self._up(rows, LinearState(gate_up[number], None)))
            return self._down(hidden, LinearState(down[number], None))

        return mixture(x, router_logits, self.spec.top_k, renormalize=self.spec.renormalize, expert=expert)
