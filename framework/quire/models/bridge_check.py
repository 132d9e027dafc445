"""Runs a loaded bridged model on a few tokens and refuses it if its attention is not what was declared.

transformers has no list of what an architecture does between its layers. What would be wrong without
a message is looked for here: attention called twice in a layer, or not at all; masks that are neither
causal nor the layer's window; state that is kept elsewhere than in keys and values; positions ignored;
a head that runs the layers again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quire.contract.attention import AttentionLayer
from quire.errors import UnsupportedModel
from quire.models.bridge_attention import MaskFunction, plain_attention, refuse_mask, running

NUM_TOKENS = 6
SIMILAR = 0.98
"""Least cosine of hidden states computed at once and one by one; rounding in bfloat16 stays far above."""
FAR = 1 << 18
"""Position of the query that masks are looked at from: beyond any window."""
Forward = Callable[[Tensor, Tensor], Tensor]
Logits = Callable[[Tensor], Tensor]


class _Watched:
    """A step that keeps keys and values in lists, and counts the model's calls."""

    def __init__(self, layers: tuple[AttentionLayer, ...]) -> None:
        self.layers = layers
        self.calls: Counter[int] = Counter()
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls[layer.layer_id] += 1
        if layer.layer_id in self._kv:
            before = self._kv[layer.layer_id]
            k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        self._kv[layer.layer_id] = (k, v)
        return plain_attention(layer, q, k, v)

    def mask(self, mask_function: MaskFunction) -> Tensor | None:
        return None

    def check_mask(self, layer: AttentionLayer, mask: Tensor | None) -> None:
        refuse_mask(layer, mask)


class _WatchedMasks(_Watched):
    """Hands out masks that say what they are, to see which layer gets which."""

    def mask(self, mask_function: MaskFunction) -> Tensor | None:
        mask = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS)
        mask.quire_span = _span(mask_function)  # type: ignore[attr-defined]
        return mask

    def check_mask(self, layer: AttentionLayer, mask: Tensor | None) -> None:
        # A mask that the model has changed bears no mark; the steps without masks show what becomes of it.
        span = getattr(mask, "quire_span", None)
        if span is not None and span != (layer.sliding_window or FAR + 1):
            raise UnsupportedModel(
                f"layer {layer.layer_id} masks attention otherwise than declared (window {layer.sliding_window})"
            )


def check_model(
    layers: tuple[AttentionLayer, ...], forward: Forward, logits: Logits, vocab_size: int, device: torch.device
) -> None:
    """Raise UnsupportedModel if the model cannot be served.

    Args:
        layers: the declared layers.
        forward: (input_ids [T], positions [T]) -> hidden states [T, H], to be called within `running`.
        logits: hidden states [T, H] -> [T, V].
        vocab_size: V.
        device: where the model is.
    """
    ids = (torch.arange(NUM_TOKENS, device=device) * 7 + 3) % vocab_size
    positions = torch.arange(NUM_TOKENS, device=device)
    with running(_WatchedMasks(layers)):
        forward(ids, positions)
    watched = _Watched(layers)
    with running(watched):
        whole = forward(ids, positions)
        calls = {layer.layer_id: watched.calls[layer.layer_id] for layer in layers}
        if odd := {index: count for index, count in calls.items() if count != 1}:
            raise UnsupportedModel(f"it calls attention another number of times than once in layers {odd}")
        logits(whole)
    if watched.calls.total() != len(layers):
        raise UnsupportedModel("its output head cannot be told from its layers")
    watched = _Watched(layers)
    with running(watched):
        single = torch.cat([forward(ids[i : i + 1], positions[i : i + 1]) for i in range(NUM_TOKENS)])
    # The median: routing to experts may differ by rounding for a token.
    likeness = functional.cosine_similarity(whole.float(), single.float()).median()
    if not likeness >= SIMILAR:
        raise UnsupportedModel(
            "its hidden states differ when tokens are computed one by one: it keeps state beside keys and values"
        )


def _span(mask_function: MaskFunction) -> int:
    """How many keys a far query sees, itself and those right before it; -1 for any other pattern."""
    keys = torch.arange(FAR + 2)
    zero, query = torch.tensor(0), torch.tensor(FAR)
    seen = torch.as_tensor(mask_function(zero, zero, query, keys)).expand(keys.shape)
    span = int(seen.sum())
    expected = (keys <= FAR) & (keys > FAR - span)
    return span if torch.equal(seen, expected) else -1
