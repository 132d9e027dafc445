"""Runs a checkpoint layer by layer through transformers, so that one layer's weights are in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
        base = self.model.model
        for name, module in list(self.model.named_modules()):
            if not name.startswith("model.layers."):
                self._materialize(module, name)
        kept = base.layers
        self.calls: list[Any] = []
        base.layers = nn.ModuleList(Recorder(layer, self.calls) for layer in kept)
        try:
            base(input_ids=rows[:1], use_cache=False)
            first = torch.cat([self._first_input(row[None]) for row in rows])
        finally:
            base.layers = kept
        return first

    def _first_input(self, row: Tensor) -> Tensor:
        seen: list[Any] = []
        recorders = self.model.model.layers
        recorders[0].calls = seen
        self.model.model(input_ids=row, use_cache=False)
        hidden: Tensor = seen[0][0]
        return hidden

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

    def load(self, index: int, changed: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The layer with its stored weights in float32, or with those in `changed` (names within the layer)."""
        layer: nn.Module = self.model.model.layers[index]
        for name, module in layer.named_modules():
            self._materialize(module, f"model.layers.{index}" + (f".{name}" if name else ""))
        for name, tensor in (changed or {}).items():
            layer.get_parameter(name).data = tensor.float()
        return layer

    def unload(self, index: int) -> None:
        """Forget the layer's weights."""
        layer = self.model.model.layers[index]
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """[R, L, hidden] through the layer that is loaded, row by row."""
        layer, (_, arguments, options) = self.model.model.layers[index], self.calls[index]
        outs = []
        for row in hidden:
            out = layer(row[None], *arguments, **options)
            outs.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(outs)

    def perplexity(self, hidden: Tensor, rows: Tensor) -> float:
        """Of token ids [R, L], from what leaves the last layer."""
        losses = []
        for state, row in zip(hidden, rows, strict=True):
            logits = self.model.lm_head(self.model.model.norm(state[None]))[0]
            cap = getattr(self.model.config, "final_logit_softcapping", None)
            logits = torch.tanh(logits / cap) * cap if cap else logits
            losses.append(nn.functional.cross_entropy(logits[:-1], row[1:]))
        return float(torch.stack(losses).mean().exp())


class Recorder(nn.Module):
    """Stands for a layer: notes how it is called and passes its input on."""

    def __init__(self, layer: nn.Module, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        for name in ("attention_type", "layer_type"):  # the model reads these of its layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.calls.append((hidden, arguments, options))
        return hidden


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Name within the layer -> linear layer."""
    return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}


def sharing(layer: nn.Module, run: Any) -> list[list[str]]:
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
    """XᵀX / tokens and the mean of |X| of a linear layer's inputs."""

    def __init__(self, module: nn.Linear) -> None:
        size = module.in_features
        self.total, self.magnitude, self.count = torch.zeros(size, size), torch.zeros(size), 0
        self._hook = module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self.total.addmm_(x.t(), x)
        self.magnitude += x.abs().sum(0)
        self.count += len(x)

    def done(self) -> tuple[Tensor, Tensor]:
        """(moment [K, K], mean of magnitudes [K]) of what was seen."""
        self._hook.remove()
        return self.total / self.count, self.magnitude / self.count
