"""Attention over the first tokens and a window (Xiao et al. 2023, "Efficient streaming language models with
attention sinks"), so that a token costs the same however long its context is.

Without options it is exact. With `window` it leaves keys out on purpose: `sees` says which, the conformance kit
holds it to that, and Quire warns when it starts. Keys keep the positions at which they were computed, and the
cache keeps all of them: time is saved, not memory, and the model's own limit on positions stays.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import AttentionBackend, AttentionBatch, AttentionCaps, AttentionInit, AttentionLayer, KVCaches
from torch import Tensor

QUERIES = 128
"""Query tokens that are computed at once."""


class StreamingOptions(BaseModel):
    """What stands under `plugins.options.streaming` in the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int | None = Field(default=None, ge=1)
    """Latest tokens that a query sees, itself included; None: all of them, which is exact."""
    num_sinks: int = Field(default=4, ge=0)
    """First tokens of the context that every query sees as well."""


class StreamingAttention(AttentionBackend):
    """See the module's docstring."""

    caps = AttentionCaps(
        device_types=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        features=frozenset({"causal", "sliding_window", "logit_softcap", "v_head_dim"}),
        needs_exact_host_lens=True,
    )

    def __init__(self, init: AttentionInit) -> None:
        super().__init__(init)
        options = init.options or StreamingOptions()
        self._window: int | None = options.window
        self._num_sinks: int = options.num_sinks

    def sees(self, layer: AttentionLayer, query: Tensor, key: Tensor) -> Tensor | None:
        if self._window is None:
            return None
        return (key < self._num_sinks) | (key > query - self._window)

    def forward(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
        plan: Any,
        out: Tensor,
    ) -> None:
        starts = batch.query_start_loc_host.tolist()
        for row, length in enumerate(batch.seq_lens_host.tolist()):
            first, last = starts[row], starts[row + 1]
            for begin in range(first, last, QUERIES):
                end = min(begin + QUERIES, last)
                query = torch.arange(length - last + begin, length - last + end, device=q.device)[:, None]
                key = self._candidates(layer, length - last + begin, length - last + end).to(q.device)
                seen = key <= query
                if layer.sliding_window is not None:
                    seen = seen & (key > query - layer.sliding_window)
                if (kept := self.sees(layer, query, key)) is not None:
                    seen = seen & kept
                blocks = batch.block_table[row, key // batch.block_size].long()
                keys, values = (cache[blocks, key % batch.block_size] for cache in kv)
                out[begin:end] = attend(layer, q[begin:end], keys, values, seen).to(out.dtype)
        out[starts[-1] :] = 0

    def _candidates(self, layer: AttentionLayer, first: int, end: int) -> Tensor:
        """Positions that some query from `first` to before `end` may see."""
        windows = [size for size in (self._window, layer.sliding_window) if size is not None]
        start = max(0, first - min(windows) + 1) if windows else 0
        num_sinks = 0 if self._window is None else min(self._num_sinks, start)
        return torch.cat([torch.arange(num_sinks), torch.arange(start, end)])


def attend(layer: AttentionLayer, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q [n, Hq, D], keys [m, Hkv, D], values [m, Hkv, Dv], seen bool [n, m] -> float32 [n, Hq, Dv]."""
    group = layer.num_heads // layer.num_kv_heads
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * layer.scale
    if layer.logit_softcap is not None:
        scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
