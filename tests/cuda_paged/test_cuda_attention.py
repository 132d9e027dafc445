"""The Triton kernels pass the kit in Triton's interpreter, and the kit kills kernels with plausible bugs."""

import dataclasses

import pytest
from quire.contract.attention import AttentionBackend
from quire.testing.attention import AttentionConformance
from quire.testing.attention_harness import AttentionHarness
from quire.testing.attention_results import AttentionResults
from quire_cuda_paged.attention import CudaPagedAttention


class Interpreted(CudaPagedAttention):
    caps = dataclasses.replace(CudaPagedAttention.caps, device_types=frozenset({"cpu"}))


class TestCudaPaged(AttentionConformance):
    """See conftest.py for what the default suite leaves out."""

    examples = 5

    @pytest.fixture
    def backend_class(self) -> type[AttentionBackend]:
        return Interpreted


@pytest.mark.kernels
class TestManyShapes(AttentionHarness):
    """As many random problems as other backends are given."""

    examples = AttentionResults.examples
    test_any_shape = AttentionResults.test_any_shape

    @pytest.fixture
    def backend_class(self) -> type[AttentionBackend]:
        return Interpreted
