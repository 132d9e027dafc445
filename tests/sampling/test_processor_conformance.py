"""The built-in processors pass the kit; `test_kit_mutants` shows that the kit kills faulty ones."""

import pytest
from kit_faults.sampling import KeepsTop
from quire import SamplingParams
from quire.sampling.processors import LogitBias, MinTokens, Penalties, TokenFilter
from quire.testing.logits_processor import LogitsProcessorConformance


class TestTokenFilter(LogitsProcessorConformance):
    active_params = TokenFilter.conformance["active_params"]

    @pytest.fixture
    def processor_class(self):
        return TokenFilter


class TestLogitBias(LogitsProcessorConformance):
    active_params = LogitBias.conformance["active_params"]

    @pytest.fixture
    def processor_class(self):
        return LogitBias


class TestMinTokens(LogitsProcessorConformance):
    active_params = MinTokens.conformance["active_params"]

    @pytest.fixture
    def processor_class(self):
        return MinTokens


class TestPenalties(LogitsProcessorConformance):
    active_params = Penalties.conformance["active_params"]

    @pytest.fixture
    def processor_class(self):
        return Penalties


class TestKeepsTop(LogitsProcessorConformance):
    active_params = tuple(SamplingParams(extra_args={"keep": keep}) for keep in (1, 4, 12))

    @pytest.fixture
    def processor_class(self):
        return KeepsTop


def test_a_processor_without_samples_is_not_certified():
    with pytest.raises(AssertionError, match="active_params"):
        LogitsProcessorConformance().test_there_is_something_to_test(KeepsTop)
