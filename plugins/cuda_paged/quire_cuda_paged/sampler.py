"""The sampler: what `quire.sampling.sampler` defines, in one launch and without a word from the host."""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
from quire.plugin import Sampler, SamplingBatch
from torch import Tensor

from quire_cuda_paged.sampling_kernels import sample_kernel

NUM_WARPS = 16


class CudaSampler(Sampler):
    """Rows are served by a program each, so a row's token depends on nothing else in the batch."""

    block: ClassVar[int] = 1024
    """Logits per turn; with 16 warps the sums of a walk stay in registers."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        if batch.all_greedy:
            return logits.argmax(-1)
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        vocab_size = logits.shape[1]
        sample_kernel[(logits.shape[0],)](
            tokens,
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.seeds,
            batch.positions,
            logits.stride(0),
            VOCAB=vocab_size,
            BLOCK=self.block,
            BLOCKS=num_blocks(vocab_size, self.block),
            num_warps=NUM_WARPS,
        )
        return tokens


def num_blocks(vocab_size: int, block: int) -> int:
    """Turns over a row, as a power of two."""
    return int(triton.next_power_of_2(triton.cdiv(vocab_size, block)))
