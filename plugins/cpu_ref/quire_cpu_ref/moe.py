"""Mixture of experts: route each token, then run each expert once over its tokens."""

from __future__ import annotations

from quire.plugin import GatedActSpec, LinearSpec, MoESpec
from torch import Tensor
from torch.nn import functional

from quire_cpu_ref.linear import DeterministicLinear, LinearState, TorchLinear
from quire_cpu_ref.pointwise import TorchGatedAct


class TorchMoE:
    """Softmax over all experts, the `top_k` best of them, weighted sum of their outputs."""

    def __init__(self, spec: MoESpec) -> None:
        self.spec = spec
        linear = DeterministicLinear if spec.deterministic else TorchLinear
        size, inner = spec.hidden_size, spec.intermediate_size
        self._up = linear(LinearSpec(size, 2 * inner, False, spec.dtype, spec.deterministic))
        self._down = linear(LinearSpec(inner, size, False, spec.dtype, spec.deterministic))
        self._act = TorchGatedAct(GatedActSpec(inner, spec.activation, spec.dtype, spec.deterministic))

    def __call__(self, x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, experts = route(router_logits, self.spec.top_k, self.spec.renormalize)
        weights = weights.to(x.dtype)
        # One slot per choice, summed in order of the choices, so that the order of experts cannot matter.
        outputs = x.new_zeros(x.shape[0], self.spec.top_k, x.shape[1])
        for expert in sorted(set(experts.flatten().tolist())):
            tokens, choices = (experts == expert).nonzero(as_tuple=True)
            hidden = self._act(self._up(x[tokens], LinearState(gate_up[expert], None)))
            result = self._down(hidden, LinearState(down[expert], None))
            outputs[tokens, choices] = result * weights[tokens, choices, None]
        return _ordered_sum(outputs)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """(weights float32 [T, k], experts int64 [T, k]) from logits [T, E]."""
    probabilities = functional.softmax(router_logits.float(), -1)
    weights, experts = probabilities.topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def _ordered_sum(outputs: Tensor) -> Tensor:
    total = outputs[:, 0]
    for choice in range(1, outputs.shape[1]):
        total = total + outputs[:, choice]
    return total
