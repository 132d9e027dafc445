"""Quantizes one decoder layer that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quire_quant.solve import Solution, Target, awq_scale, clipped, gptq, grid, output_error, round_to_nearest
from quire_quant.store import fits
from quire_quant.walk import Moment, linears

UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")
"""Their outputs meet in a product, so that each one's own error says little."""
BEFORE = {
    "q_proj": ("input_layernorm",),
    "qkv_proj": ("input_layernorm",),
    "o_proj": ("self_attn.v_proj", "self_attn.qkv_proj"),
    "gate_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
    "gate_up_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
    "down_proj": ("mlp.up_proj", "mlp.gate_up_proj"),
}
"""First layer of a group -> what may stand before it and take over its inputs' factors; the first there is."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize: method gptq, awq or rtn; the rest as in `solve.Target` and `solve.gptq`."""

    method: str
    bits: int
    group_size: int
    sym: bool
    damping: float = 0.01

    def target(self, inputs: int) -> Target:
        """For a layer of so many inputs; a group of -1 is all of them."""
        return Target(self.bits, inputs if self.group_size == -1 else self.group_size, self.sym)


@dataclass
class Solved:
    """A layer's result.

    Attributes:
        solutions: name within the layer -> codes. errors: name -> relative error of the output, if inputs were seen.
        changed: names of other parameters that have new values.
    """

    solutions: dict[str, Solution] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


def solve_layer(layer: nn.Module, groups: list[list[str]], recipe: Recipe, run: Callable[[], Any] | None) -> Solved:
    """Choose codes for each linear layer and put the weights that they mean in place.

    Args:
        layer: loaded in float32. groups: its linear layers in order of use, those with one input together.
        run: sends the calibration inputs through the layer; None: there are none (rtn only).
    """
    solved = Solved()
    job = _Job(layer, recipe, solved)
    if run is None:
        for group in groups:
            job.solve(group, None)
    elif recipe.method == "awq":
        moments = _moments(layer, [group[0] for group in groups], run)
        # All factors first: those of a later group change weights of an earlier one.
        folded = [job.fold(group, *moment) for group, moment in zip(groups, moments, strict=True)]
        for group, moment in zip(groups, folded, strict=True):
            job.solve(group, moment)
    else:
        # One group after the other, so that each sees the errors of those before it.
        for group in groups:
            ((moment, _),) = _moments(layer, group[:1], run)
            job.solve(group, moment)
    return solved


@dataclass(frozen=True, slots=True)
class _Job:
    layer: nn.Module
    recipe: Recipe
    solved: Solved

    def solve(self, group: list[str], moment: Tensor | None) -> None:
        """Codes for each layer of a group that fills whole groups of inputs and words."""
        for name in group:
            module = linears(self.layer)[name]
            weight = module.weight.data
            target = self.recipe.target(module.in_features)
            if not fits(module.in_features, module.out_features, target):
                continue
            solution = self._codes(name, weight, moment, target)
            self.solved.solutions[name] = solution
            if moment is not None:
                self.solved.errors[name] = output_error(weight, solution.weight(), moment)
            module.weight.data = solution.weight()

    def _codes(self, name: str, weight: Tensor, moment: Tensor | None, target: Target) -> Solution:
        if self.recipe.method == "gptq" and moment is not None:
            return gptq(weight, moment, target, self.recipe.damping)
        if self.recipe.method == "awq" and moment is not None and not name.endswith(UNCLIPPED):
            return clipped(weight, moment, target)
        return round_to_nearest(weight, target, *grid(weight, target))

    def fold(self, group: list[str], moment: Tensor, magnitude: Tensor) -> Tensor:
        """Scale a group's inputs and weights by AWQ's factors, if what stands before can take them.

        Returns the moment of the scaled inputs.
        """
        modules = [linears(self.layer)[name] for name in group]
        before = self._before(group[0], len(magnitude))
        target = self.recipe.target(len(magnitude))
        if before is None or len(magnitude) % target.group_size:
            return moment
        scale = awq_scale([module.weight.data for module in modules], moment, magnitude, target)
        for module in modules:
            module.weight.data = module.weight.data * scale
        self._divide(before, scale)
        self.solved.changed |= {f"{name}.weight" for name in (*group, before)}
        return moment / torch.outer(scale, scale)

    def _before(self, name: str, inputs: int) -> str | None:
        for candidate in BEFORE.get(name.rpartition(".")[2], ()):
            module = dict(self.layer.named_modules()).get(candidate)
            if module is None:
                continue
            if not isinstance(module, nn.Linear):
                return candidate
            # The last outputs of what is fused are those wanted. Keys' heads that serve several queries are not.
            shares = {"v_proj": 1, "up_proj": 1, "gate_up_proj": 2, "qkv_proj": 3}[candidate.rpartition(".")[2]]
            return candidate if module.out_features == shares * inputs else None
        return None

    def _divide(self, name: str, scale: Tensor) -> None:
        """Divide the outputs of a norm, or the last outputs of a linear layer."""
        module = self.layer.get_submodule(name)
        weight = module.get_parameter("weight").data
        if isinstance(module, nn.Linear):
            weight[-len(scale) :] /= scale[:, None]
            if module.bias is not None:
                module.bias.data[-len(scale) :] /= scale
                self.solved.changed.add(f"{name}.bias")
        elif type(module).__name__.startswith("Gemma"):  # multiplies by 1 + weight
            module.get_parameter("weight").data = (1 + weight) / scale - 1
        else:
            module.get_parameter("weight").data = weight / scale


def _moments(layer: nn.Module, names: list[str], run: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """For each of the linear layers, what its inputs are like."""
    seen = [Moment(linears(layer)[name]) for name in names]
    run()
    return [moment.done() for moment in seen]
