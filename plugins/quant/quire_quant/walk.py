"""Runs a checkpoint layer by layer through transformers, so that one layer's weights are in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from quire.commands import Checkpoint
from quire.plugin import UnsupportedModel
from safetensors import safe_open
from torch import Tensor, nn

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Walk:
    """The model on the meta device, but for the layer at hand.

    Args:
        checkpoint: an unquantized one, whose tensors have the names that transformers gives them.

    Raises:
        UnsupportedModel: quantized already, with experts, or of another build than decoder layers behind each other.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        import transformers

        self.checkpoint = checkpoint
        if checkpoint.quantization_config:
            raise UnsupportedModel(
                f"{checkpoint.name} is quantized already", remedy="name the checkpoint it was made of"
            )
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            self.model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.num_layers = int(config.num_hidden_layers)
        experts = [name for name in self.model.state_dict() if ".experts." in name]
        if experts:
            raise UnsupportedModel(
                f"{checkpoint.name} has experts ({experts[0]}); those are not quantized here",
                remedy="run it with `--quantization int8`, or quantize a dense model",
            )
        odd = [name for name in self.model.state_dict() if name not in checkpoint.tensors and name != "lm_head.weight"]
        if odd or not hasattr(getattr(self.model, "model", None), "layers"):
            raise UnsupportedModel(
                f"{checkpoint.name} is not a plain decoder: {odd[:1] or 'it has no model.layers'}",
                remedy="quantize dense models of the families that docs/quantization.md names",
            )

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        with safe_open(str(self.checkpoint.tensors[name].path), "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def names(self, layer: int | None) -> list[str]:
        """Stored tensors of a layer; None: of no layer."""

        def of(name: str) -> int | None:
            found = LAYER.match(name)
            return int(found[1]) if found else None

        return sorted(name for name in self.checkpoint.tensors if of(name) == layer)

    def embed(self, rows: Tensor) -> Tensor:
        """Token ids [R, L] -> what enters the first layer [R, L, hidden], float32.

        Notes what each layer is called with, for `run`.
        """
        for name, module in list(self.model.named_modules()):
            if not name.startswith("model.layers."):
                self._materialize(module, name)
        layers = self.model.model.layers
        entered: list[Any] = []
        self._calls: list[Any] = []
        with self._standing_in(StandIn(layer, self._calls) for layer in layers):
            self.model.model(input_ids=rows[:1], use_cache=False)
        with self._standing_in([StandIn(layers[0], entered)]):
            for row in rows:
                self.model.model(input_ids=row[None], use_cache=False)
        return torch.cat([hidden for hidden, _, _ in entered])

    @contextmanager
    def _standing_in(self, stand_ins: Iterable[nn.Module]) -> Iterator[None]:
        base = self.model.model
        layers, base.layers = base.layers, nn.ModuleList(stand_ins)
        try:
            yield
        finally:
            base.layers = layers

    def _materialize(self, module: nn.Module, path: str) -> None:
        """Give a module's own parameters and buffers their values."""
        derived = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in derived:  # computed, such as rotary frequencies; before parameters, which it would draw
            module.register_buffer(name, torch.empty_like(module.get_buffer(name), device="cpu"), persistent=False)
        if derived:
            self.model._init_weights(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            stored = full if full in self.checkpoint.tensors else "model.embed_tokens.weight"  # a tied head
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(self.tensor(stored).float(), requires_grad=False))

    def load(self, index: int) -> nn.Module:
        """The layer with its stored weights in float32."""
        layer: nn.Module = self.model.model.layers[index]
        for name, module in layer.named_modules():
            self._materialize(module, f"model.layers.{index}" + (f".{name}" if name else ""))
        return layer

    def unload(self, index: int) -> None:
        """Forget the layer's weights."""
        layer = self.model.model.layers[index]
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def run(self, index: int, row: Tensor) -> Tensor:
        """[L, hidden] through the layer that is loaded."""
        layer, (_, arguments, options) = self.model.model.layers[index], self._calls[index]
        out = layer(row[None], *arguments, **options)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden[0]

    def advance(self, index: int, hidden: Tensor) -> None:
        """Replace [R, L, hidden] by what the layer that is loaded makes of it."""
        for row in hidden:
            row.copy_(self.run(index, row))

    def perplexity(self, hidden: Tensor, rows: Tensor) -> float:
        """Of token ids [R, L], from what leaves the last layer."""
        losses = []
        for state, row in zip(hidden, rows, strict=True):
            # The model's own head, as some scale or cap their logits.
            with self._standing_in([StandIn(self.model.model.layers[0], [], state[None])]):
                logits = self.model(input_ids=row[None], use_cache=False).logits[0].float()
            losses.append(nn.functional.cross_entropy(logits[:-1], row[1:]))
        return float(torch.stack(losses).mean().exp())


class StandIn(nn.Module):
    """Stands for a layer: notes how it is called, and passes its input on or answers with `answer`."""

    def __init__(self, layer: nn.Module, calls: list[Any], answer: Tensor | None = None) -> None:
        super().__init__()
        self.calls, self.answer = calls, answer
        for name in ("attention_type", "layer_type"):  # the model reads these of its layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.calls.append((hidden, arguments, options))
        return hidden if self.answer is None else self.answer


@dataclass(frozen=True, slots=True)
class Feed:
    """The calibration inputs [R, L, hidden] of one layer that is loaded."""

    walk: Walk
    index: int
    hidden: Tensor

    def probe(self) -> Tensor:
        """What the layer makes of the first row."""
        return self.walk.run(self.index, self.hidden[0])

    def visit(self) -> None:
        """Send all through for hooks to see; each row no further than a hook wants it."""
        for row in self.hidden:
            try:
                self.walk.run(self.index, row)
            except Enough:
                continue


class Enough(Exception):
    """A hook has seen what it wanted of this row."""


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Name within the layer -> linear layer."""
    return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}


def sharing(layer: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Linear layers in the order of their use, those with one input together; `run` calls the layer once."""
    order: list[tuple[Tensor, str]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: order.append((inputs[0], name)))
        for name, module in linears(layer).items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    for position, (tensor, name) in enumerate(order):
        if position and order[position - 1][0] is tensor:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


class Moment:
    """XᵀX / tokens and the mean of |X| of a linear layer's inputs; `last`: nothing behind it needs to run."""

    def __init__(self, module: nn.Linear, last: bool) -> None:
        size = module.in_features
        self._total, self._magnitude, self._count = torch.zeros(size, size), torch.zeros(size), 0
        self._last = last
        self._hook = module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self._total.addmm_(x.t(), x)
        self._magnitude += x.abs().sum(0)
        self._count += len(x)
        if self._last:
            raise Enough

    def done(self) -> tuple[Tensor, Tensor]:
        """(moment [K, K], mean of magnitudes [K]) of what was seen."""
        self._hook.remove()
        return self._total / self._count, self._magnitude / self._count
