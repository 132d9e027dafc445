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
        self._widen = {dtype: kernels.function("widen", dtype) for dtype in SUFFIXES}
        self._wide = torch.empty(0)  # kept, since fresh memory costs more than all that fills it

    def widen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        run = self._widen.get(logits.dtype)
        if run is None:
            return super().widen(logits)
        logits = row_major(logits)
        rows, vocab = logits.shape
        wide = logits if logits.dtype == torch.float32 else self._room(rows, vocab)
        finite = torch.empty(rows, dtype=torch.bool)
        to = None if wide is logits else wide.data_ptr()
        run(logits.data_ptr(), logits.stride(0), to, finite.data_ptr(), rows, vocab)
        return wide, finite

    def _room(self, rows: int, vocab: int) -> Tensor:
        """float32 [rows, vocab], the same memory each time."""
        if rows * vocab > len(self._wide):
            self._wide = torch.empty(rows * vocab)
        return self._wide[: rows * vocab].view(rows, vocab)

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
