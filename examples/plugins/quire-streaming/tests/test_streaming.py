import pytest
import torch
from pydantic import ValidationError
from quire.testing.attention import AttentionConformance
from quire_streaming.attention import StreamingAttention, StreamingOptions


class TestExact(AttentionConformance):
    @pytest.fixture
    def backend_class(self):
        return StreamingAttention


class TestWindow(TestExact):
    """With keys left out, held to what `sees` says."""

    options = StreamingOptions(window=7, num_sinks=2)


def test_sinks_and_window_are_what_is_seen():
    class Init:
        options = StreamingOptions(window=3, num_sinks=2)

    seen = StreamingAttention(Init).sees(None, torch.tensor([[9]]), torch.arange(10))
    assert seen[0].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]


def test_a_window_without_the_query_itself_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        StreamingOptions(window=0)
