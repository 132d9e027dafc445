"""The built-in processors pass the kit, and the kit fails processors that are wrong in one way each."""

import pytest
import torch
from quire import SamplingParams
from quire.contract.sampling import LogitsProcessor
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


class KeepsTop(LogitsProcessor):
    """Right: leaves the most likely token, and only where it is asked to."""

    argmax_invariant = True
    extra_args = frozenset({"keep"})

    def __init__(self, init):
        super().__init__(init)
        self.keep = {}

    def add(self, slot, request):
        if "keep" not in (request.params.extra_args or {}):
            return False
        self.keep[slot] = request.params.extra_args["keep"]
        return True

    def remove(self, slot):
        del self.keep[slot]

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            logits[row, logits[row] < logits[row].topk(self.keep[slot]).values[-1]] = float("-inf")


class KeepsSecond(KeepsTop):
    """Wrong: the most likely token goes."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        logits[torch.arange(len(logits)), logits.argmax(-1)] = float("-inf")


class CountsRows(Penalties):
    """Wrong: state belongs to the row's place, not to its slot."""

    def apply(self, logits, ctx):
        order = sorted(ctx.slots)
        super().apply(logits, type(ctx)(order, ctx.num_tokens, ctx.token_ids))


class ReadsAhead(LogitsProcessor):
    """Wrong: reads the buffer behind the known tokens."""

    def add(self, slot, request):
        return request.params.presence_penalty != 0

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            logits[row, ctx.token_ids[slot].unique().long()] -= 1.0


class NeverForgets(KeepsTop):
    """Wrong: a slot's first request stays in force."""

    def add(self, slot, request):
        if slot in self.keep:
            return True
        return super().add(slot, request)

    def remove(self, slot):
        pass


class StartsAnew(LogitsProcessor):
    """Wrong: counts its own calls, which a preempted request's return sets back."""

    def __init__(self, init):
        super().__init__(init)
        self.calls = {}

    def add(self, slot, request):
        self.calls[slot] = 0
        return request.params.presence_penalty != 0

    def remove(self, slot):
        del self.calls[slot]

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            self.calls[slot] += 1
            logits[row, self.calls[slot]] = float("-inf")


class AlwaysActive(Penalties):
    """Wrong: claims work for requests that ask for nothing."""

    def add(self, slot, request):
        super().add(slot, request)
        return True


class MakesNaN(KeepsTop):
    """Wrong: the row cannot be sampled any more."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        logits.sub_(logits.clone())


class WritesTokens(KeepsTop):
    """Wrong: the token buffer is the runner's."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        ctx.token_ids.zero_()


class TestKeepsTop(LogitsProcessorConformance):
    active_params = tuple(SamplingParams(extra_args={"keep": keep}) for keep in (1, 4, 12))

    @pytest.fixture
    def processor_class(self):
        return KeepsTop


class Presence(LogitsProcessorConformance):
    active_params = (SamplingParams(presence_penalty=1.0),)


@pytest.mark.parametrize(
    ("kit", "wrong", "test"),
    [
        (TestKeepsTop, KeepsSecond, "test_the_claim_on_argmax_holds"),
        (TestPenalties, CountsRows, "test_rows_do_not_depend_on_each_other"),
        (Presence, ReadsAhead, "test_stale_tokens_are_not_read"),
        (TestKeepsTop, NeverForgets, "test_a_slot_forgets_its_request"),
        (Presence, StartsAnew, "test_preemption_changes_nothing"),
        (TestPenalties, AlwaysActive, "test_add_says_whether_there_is_work"),
        (TestKeepsTop, MakesNaN, "test_edits_in_place_and_leaves_the_rest_alone"),
        (TestKeepsTop, WritesTokens, "test_edits_in_place_and_leaves_the_rest_alone"),
        (LogitsProcessorConformance, KeepsTop, "test_there_is_something_to_test"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_kit_fails_what_is_wrong(kit, wrong, test):
    with pytest.raises(AssertionError):
        getattr(kit(), test)(wrong)
