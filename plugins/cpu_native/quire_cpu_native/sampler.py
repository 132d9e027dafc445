"""The sampler: what `quire.sampling.sampler` defines, in C++."""

from __future__ import annotations

import ctypes

import torch
from quire.plugin import Sampler, SamplerInit, SamplingBatch
from torch import Tensor

from quire_cpu_native.native import SUFFIXES, SamplingFields, native, row_major


class NativeSampler(Sampler):
    """Draws the reference's tokens: in float64, with sums in the same order, a row to a thread."""

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        kernels = native(torch.get_num_threads())
        self._run = kernels.function("sample")
        self._argmax = {dtype: kernels.function("argmax", dtype) for dtype in SUFFIXES}

    def argmax(self, logits: Tensor) -> Tensor | None:
        run = self._argmax.get(logits.dtype)
        if run is None:
            return super().argmax(logits)
        logits = row_major(logits)
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int32)
        run(logits.data_ptr(), logits.stride(0), tokens.data_ptr(), rows, vocab)
        return tokens

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        logits = row_major(logits)
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        columns = {
            name: getattr(batch, name).contiguous()
            for name in ("temperature", "top_p", "min_p", "top_k", "seeds", "positions")
        }
        fields = SamplingFields(
            **{name: column.data_ptr() for name, column in columns.items()},
            rows=logits.shape[0],
            vocab=logits.shape[1],
            stride=logits.stride(0),
        )
        self._run(ctypes.addressof(fields), logits.data_ptr(), tokens.data_ptr())
        return tokens
