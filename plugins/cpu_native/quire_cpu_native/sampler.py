"""The sampler: what `quire.sampling.sampler` defines, in C++."""

from __future__ import annotations

import torch
from quire.plugin import Sampler, SamplerInit, SamplingBatch
from torch import Tensor

from quire_cpu_native.native import SUFFIXES, Kernel, native, row_major


class NativeSampler(Sampler):
    """Draws the reference's tokens: in float64, with sums in the same order, a row to a thread."""

    def __init__(self, init: SamplerInit) -> None:
        super().__init__(init)
        kernels = native(torch.get_num_threads())
        self._sample = kernels.function("sample")
        self._choose = {dtype: kernels.function("choose", dtype) for dtype in SUFFIXES}
        self._argmax = {dtype: kernels.function("argmax", dtype) for dtype in SUFFIXES}

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor | None:
        if logits.dtype not in SUFFIXES:
            return super().choose(logits, batch)
        logits = row_major(logits)
        tokens = torch.empty(logits.shape[0], dtype=torch.int32)
        if batch.all_greedy:
            self._argmax[logits.dtype](logits.data_ptr(), logits.stride(0), tokens.data_ptr(), *logits.shape)
        else:
            _draw(self._choose[logits.dtype], logits, batch, tokens)
        return tokens

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        _draw(self._sample, row_major(logits), batch, tokens)
        return tokens


def _draw(kernel: Kernel, logits: Tensor, batch: SamplingBatch, tokens: Tensor) -> None:
    columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions)
    whole = [column.contiguous() for column in columns]
    places = (column.data_ptr() for column in whole)
    kernel(logits.data_ptr(), logits.stride(0), *logits.shape, *places, tokens.data_ptr())
