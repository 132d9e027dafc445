"""Quantizes one decoder layer that is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from quire.plugin import ConfigError
from torch import Tensor, nn

from quire_quant.solve import Solution, Target, awq_scale, clipped, gptq, grid, output_error, round_to_nearest
from quire_quant.store import fits
from quire_quant.walk import Feed, Moment, linears

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
"""First layer of a group -> what may stand before it and take over its inputs' factors; the first there is.

A guess from names: `_Job.fold` tries whether it holds.
"""
BITS = (2, 3, 4, 8)
SAME = 1e-3
"""Relative difference of a layer's float32 output below which it counts as the same function."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize: method gptq, awq or rtn; the rest as in `solve.Target` and `solve.gptq`.

    Raises:
        ConfigError: bits or group size that the formats do not have.
    """

    method: str
    bits: int
    group_size: int
    sym: bool
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}", remedy=f"allowed are {', '.join(map(str, BITS))}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(
                f"group_size is {self.group_size}",
                remedy="give a multiple of 8 (32, 64 and 128 are read everywhere), or -1 for one group per output",
            )

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


def solve_layer(layer: nn.Module, groups: list[list[str]], recipe: Recipe, feed: Feed | None) -> Solved:
    """Choose codes for each linear layer and put the weights that they mean in place.

    Args:
        layer: loaded in float32. groups: its linear layers in order of use, those with one input together.
        feed: the calibration inputs; None: there are none (rtn only).
    """
    solved = Solved()
    job = _Job(layer, recipe, solved)
    if feed is None:
        for group in groups:
            job.solve(group, None)
    elif recipe.method == "awq":
        moments = _moments(layer, [group[0] for group in groups], feed)
        # All factors first: those of a later group change weights of an earlier one.
        folded = [job.fold(group, *moment, feed) for group, moment in zip(groups, moments, strict=True)]
        for group, moment in zip(groups, folded, strict=True):
            job.solve(group, moment)
    else:
        # One group after the other, so that each sees the errors of those before it.
        for group in groups:
            ((moment, _),) = _moments(layer, group[:1], feed)
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

    def fold(self, group: list[str], moment: Tensor, magnitude: Tensor, feed: Feed) -> Tensor:
        """Scale a group's inputs and weights by AWQ's factors, if what stands before can take them.

        Whether it can is tried: families differ in where norms stand, who else reads them, and by what they multiply.

        Returns the moment of the inputs, scaled or not.
        """
        modules = [linears(self.layer)[name] for name in group]
        before = self._before(group[0], len(magnitude))
        target = self.recipe.target(len(magnitude))
        if before is None or len(magnitude) % target.group_size:
            return moment
        scale = awq_scale([module.weight.data for module in modules], moment, magnitude, target)
        wanted = feed.probe()
        plain = [module.weight.data for module in modules]
        for module in modules:
            module.weight.data = module.weight.data * scale
        for offset in (0.0, 1.0):
            kept = _divide(self.layer.get_submodule(before), scale, offset)
            if (feed.probe() - wanted).norm() <= SAME * wanted.norm():
                self.solved.changed |= {f"{name}.weight" for name in (*group, before)} | {f"{before}.bias"}
                return moment / torch.outer(scale, scale)
            for parameter, value in kept:
                parameter.data = value
        for module, weight in zip(modules, plain, strict=True):
            module.weight.data = weight
        return moment

    def _before(self, name: str, inputs: int) -> str | None:
        for candidate in BEFORE.get(name.rpartition(".")[2], ()):
            module = dict(self.layer.named_modules()).get(candidate)
            if module is None:
                continue
            if not isinstance(module, nn.Linear):
                return candidate if getattr(module, "weight", None) is not None else None
            # The last outputs of what is fused are those wanted. Keys' heads that serve several queries are not.
            shares = {"v_proj": 1, "up_proj": 1, "gate_up_proj": 2, "qkv_proj": 3}[candidate.rpartition(".")[2]]
            return candidate if module.out_features == shares * inputs else None
        return None


def _divide(module: nn.Module, scale: Tensor, offset: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Divide the last outputs of a linear layer, or those of a norm that multiplies by its weight + offset.

    Returns the parameters that changed, with what they were.
    """
    kept = []
    for name, own in module.named_parameters(recurse=False):
        kept.append((own, own.data))
        shift = offset if name == "weight" and not isinstance(module, nn.Linear) else 0.0
        own.data = own.data.clone()
        part = own.data[-len(scale) :]
        part.copy_((part + shift) / (scale[:, None] if part.dim() == 2 else scale) - shift)
    return kept


def _moments(layer: nn.Module, names: list[str], feed: Feed) -> list[tuple[Tensor, Tensor]]:
    """For each of the linear layers, in the order of their use, what its inputs are like."""
    seen = [Moment(linears(layer)[name], last=name == names[-1]) for name in names]
    feed.visit()
    return [moment.done() for moment in seen]
