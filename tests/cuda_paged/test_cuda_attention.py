"""The Triton kernels pass the kit in Triton's interpreter, and the kit kills kernels with plausible bugs."""

import dataclasses

import pytest
from quire.contract.attention import AttentionBackend
from quire.testing.attention import AttentionConformance
from quire_cuda_paged.attention import CudaPagedAttention


class Interpreted(CudaPagedAttention):
    caps = dataclasses.replace(CudaPagedAttention.caps, device_types=frozenset({"cpu"}))


class TestCudaPaged(AttentionConformance):
    @pytest.fixture
    def backend_class(self) -> type[AttentionBackend]:
        return Interpreted
