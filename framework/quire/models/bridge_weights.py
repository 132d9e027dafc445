"""Places a checkpoint's tensors in transformers' model, under the names and in the form that it wants them.

transformers renames tensors of older checkpoints, and merges some (the experts of a layer); its own
tables say how, and are followed here.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from quire.contract.model import ModelInit
from quire.errors import UnsupportedModel
from quire.layers.weights import Take, WeightTable

DERIVED = re.compile(r"(\.inv_freq|\.attention\.bias|\.attn\.bias|\.masked_bias)$")
"""Tables that old checkpoints carry along and that the model computes."""


class BridgeWeights:
    """Takes tensors by the checkpoint's names."""

    def __init__(self, init: ModelInit, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._init, self._model = init, model
        steps = get_model_conversion_mapping(model)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._collected: dict[str, list[tuple[str, str, Tensor]]] = defaultdict(list)
        self._names = dict(model.state_dict(keep_vars=True))
        self._table = WeightTable()
        tied = _tied_names(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._table.expect(name, tuple(parameter.shape), self._taker(name), required=name not in tied)
        for name, buffer in model.named_buffers():
            if name in self._names:
                self._table.expect(name, tuple(buffer.shape), self._taker(name))

    def load(self, name: str, tensor: Tensor) -> bool:
        """Take one tensor; False if there is no place for it."""
        from transformers.core_model_loading import rename_source_key

        if self._table.load(name, tensor):
            return True
        prefix = str(self._model.base_model_prefix)
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._names)
        if pattern is None:
            return self._table.load(renamed, tensor) or DERIVED.search(name) is not None
        if renamed not in self._names:
            return False
        dtype = self._init.dtype if tensor.is_floating_point() else tensor.dtype
        self._collected[renamed].append((name, pattern, tensor.to(dtype, copy=True)))
        return True

    def missing(self) -> list[str]:
        """Names that are still wanted, after what was collected has been merged."""
        for target in list(self._collected):
            self._merge(target, self._collected.pop(target))
        return self._table.missing()

    def _merge(self, target: str, sources: list[tuple[str, str, Tensor]]) -> None:
        pattern = sources[0][1]
        converter = copy.deepcopy(next(step for step in self._converters if pattern in step.source_patterns))
        for name, source_pattern, tensor in sorted(sources, key=lambda source: _natural(source[0])):
            converter.add_tensor(target, name, source_pattern, tensor)
        names = [name for name, _, _ in sources]
        sources.clear()
        try:
            merged = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise UnsupportedModel(
                f"{names[0]!r} and {len(names) - 1} more do not make up {target!r}: {error}",
                remedy="the checkpoint is incomplete",
            ) from error
        for name, value in merged.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self._table.load(name, tensor):
                raise UnsupportedModel(f"{names[0]!r} becomes {name!r}, which the model has no place for")

    def _taker(self, name: str) -> Take:
        owner_name, _, attribute = name.rpartition(".")
        owner: nn.Module = self._model.get_submodule(owner_name)

        def take(tensor: Tensor) -> None:
            dtype = self._init.dtype if tensor.is_floating_point() else tensor.dtype
            placed = tensor.to(self._init.device, dtype, copy=True)
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(placed, requires_grad=False)
            else:
                owner._buffers[attribute] = placed

        return take


def _tied_names(model: Any) -> set[str]:
    """Parameters that are other ones once more, and need not be stored."""
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts experts.10 behind experts.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def fill_buffers(model: Any, device: torch.device) -> None:
    """Derived buffers (rotary frequencies) are not stored; a second model, without weights, computes them."""
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not missing:
        return
    fresh = dict(_without_weights(type(model), copy.deepcopy(model.config)).named_buffers())
    for name in missing:
        owner_name, _, attribute = name.rpartition(".")
        model.get_submodule(owner_name)._buffers[attribute] = fresh[name].to(device)


def _without_weights(kind: Any, config: Any) -> Any:
    """Build with parameters on the meta device and buffers in memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        return kind(config)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
