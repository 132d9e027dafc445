"""The bridge's attention: what transformers' layers call, and what they may ask of it.

Some architectures drop extra keyword arguments on the way to their attention, so the step's context
travels in a variable that is set for the duration of one forward pass, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from quire.contract.attention import AttentionLayer
from quire.contract.model import StepContext
from quire.errors import UnsupportedModel

NAME = "quire"
HEAD_SIZE_NAMES = ("head_dim", "head_size", "attention_head_size")
CHANGES_SCORES = ("s_aux", "position_bias", "alibi", "head_mask")
"""Keyword arguments that would change attention's result, and that no declared layer carries."""


MaskFunction = Callable[..., Tensor]
"""transformers' form of a mask: (batch, head, query position, key position) -> seen or not."""


class Step(Protocol):
    """One forward pass, as the attention calls see it."""

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """The declared layers."""
        ...

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq·D]; keeps k and v for later steps."""
        ...

    def mask(self, mask_function: MaskFunction) -> Tensor | None:
        """What the model gets for a mask that it asks for."""
        ...

    def check_mask(self, layer: AttentionLayer, mask: Tensor | None) -> None:
        """Raises UnsupportedModel if the layer is handed a mask that it has not declared."""
        ...


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step over the backend's caches."""

    ctx: StepContext
    layers: tuple[AttentionLayer, ...]

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx = self.ctx
        ctx.backend.write_kv(layer, k, v, ctx.kv[layer.layer_id], ctx.batch)
        return ctx.attend(layer, q, k, v)

    def mask(self, mask_function: MaskFunction) -> Tensor | None:
        """None: backends mask by position."""
        return None

    def check_mask(self, layer: AttentionLayer, mask: Tensor | None) -> None:
        refuse_mask(layer, mask)


_step: ContextVar[Step] = ContextVar("quire_bridge_step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Let attention calls reach `step` meanwhile."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def register() -> None:
    """Make our attention known to transformers; may be repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def layers_of(model: Any) -> tuple[AttentionLayer, ...]:
    """The layers that the model will call attention for. Raises UnsupportedModel.

    Read from the modules' attributes, which differ between architectures; `bridge_check` holds them
    against the calls that the loaded model makes.
    """
    config = model.config.get_text_config()
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    found = {
        module.layer_idx: module
        for module in modules
        if hasattr(module, "scaling") or any(hasattr(module, name) for name in HEAD_SIZE_NAMES)
    }
    if sorted(found) != list(range(len(found))) or not found:
        raise UnsupportedModel(f"attention is found in layers {sorted(found)} only, not in each")
    return tuple(_layer(index, module, config) for index, module in sorted(found.items()))


def _layer(index: int, module: Any, config: Any) -> AttentionLayer:
    heads = int(config.num_attention_heads)
    sizes = (getattr(module, name, None) for name in HEAD_SIZE_NAMES)
    size = int(next((value for value in sizes if value), config.hidden_size // heads))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return AttentionLayer(
        layer_id=index,
        num_heads=heads,
        num_kv_heads=heads // int(getattr(module, "num_key_value_groups", 1)),
        head_dim=size,
        v_head_dim=size,
        scale=float(getattr(module, "scaling", None) or size**-0.5),
        sliding_window=getattr(module, "sliding_window", None),
        logit_softcap=None if softcap is None else float(softcap),
    )


def refuse_mask(layer: AttentionLayer, mask: Tensor | None) -> None:
    """Raise UnsupportedModel if there is a mask, though none was handed out."""
    if mask is not None:
        raise UnsupportedModel(f"layer {layer.layer_id} masks attention in a way of its own")


def _mask(*args: Any, mask_function: MaskFunction, **kwargs: Any) -> Tensor | None:
    step = _step.get(None)
    return None if step is None else step.mask(mask_function)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D], not repeated -> [1, T, Hq, D]."""
    step = _step.get()
    layer = step.layers[int(cast(int, module.layer_idx))]
    step.check_mask(layer, attention_mask)
    if softcap != layer.logit_softcap or sliding_window not in (None, layer.sliding_window):
        raise UnsupportedModel(
            f"layer {layer.layer_id} asks for softcap {softcap} and window {sliding_window}; "
            f"declared were {layer.logit_softcap} and {layer.sliding_window}"
        )
    for name in CHANGES_SCORES:
        if others.get(name) is not None:
            raise UnsupportedModel(f"layer {layer.layer_id} passes {name!r} to its attention, which is not supported")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    _check_shapes(layer, q, k, v)
    if scaling is not None and scaling != layer.scale:
        # Some models scale their queries before the call, and ask for a factor of one.
        q = q * (scaling / layer.scale)
    return step.attend(layer, q, k, v).view(1, q.shape[0], layer.num_heads, layer.v_head_dim), None


def _check_shapes(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> None:
    have = [tuple(x.shape[1:]) for x in (q, k, v)]
    want = [
        (layer.num_heads, layer.head_dim),
        (layer.num_kv_heads, layer.head_dim),
        (layer.num_kv_heads, layer.v_head_dim),
    ]
    if have != want:
        raise UnsupportedModel(f"layer {layer.layer_id} calls attention with heads {have}; expected were {want}")


def plain_attention(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The declared layer's attention in plain torch, for T queries behind S - T earlier keys -> [T, Hq·D]."""
    groups = layer.num_heads // layer.num_kv_heads
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.float(), k) * layer.scale
    if layer.logit_softcap is not None:
        scores = torch.tanh(scores / layer.logit_softcap) * layer.logit_softcap
    at = torch.arange(k.shape[0], device=q.device)
    ahead = at[None, :] - at[-q.shape[0] :, None]
    hidden = ahead > 0
    if layer.sliding_window is not None:
        hidden |= ahead <= -layer.sliding_window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1).to(q.dtype)
