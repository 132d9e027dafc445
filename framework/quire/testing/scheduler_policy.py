"""Conformance of scheduler policies: total order, decisions within bounds, no memory of requests."""

from __future__ import annotations

import random

import pytest

from quire.contract.scheduling import PolicyInit, RequestView, SchedulerPolicy, SchedulerView


def request_view(rng: random.Random, name: str) -> RequestView:
    """A random request."""
    prompt = rng.randrange(1, 500)
    return RequestView(name, rng.uniform(0, 50), rng.randrange(-3, 4), prompt, rng.randrange(50), prompt, 100, 0)


class SchedulerPolicyConformance:
    """What every policy must hold. Subclass, and give the fixture `policy_class`."""

    @pytest.fixture
    def policy_class(self) -> type[SchedulerPolicy]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `policy_class`")

    def view(self, now: float = 60.0) -> SchedulerView:
        return SchedulerView(now, 3, 5, 10, 20, 8, 256)

    def test_keys_can_be_compared(self, policy_class: type[SchedulerPolicy]) -> None:
        """Keys are tuples of numbers of one length, and equal calls give equal keys.

        If it fails: return plain numbers, no NaN, derived from the arguments alone.
        """
        policy, rng = policy_class(PolicyInit()), random.Random(0)
        views = [request_view(rng, str(index)) for index in range(30)]
        keys = [policy.key(view, 60.0) for view in views]
        assert keys == [policy.key(view, 60.0) for view in views]
        assert len({len(key) for key in keys}) == 1
        assert sorted(keys)

    def test_victims_are_candidates(self, policy_class: type[SchedulerPolicy]) -> None:
        """The victim is one of the requests that were offered.

        If it fails: return the `request_id` of an element of `running`, whatever its length is.
        """
        policy, rng = policy_class(PolicyInit()), random.Random(1)
        for count in range(1, 8):
            running = [request_view(rng, str(index)) for index in range(count)]
            assert policy.pick_victim(running, self.view()) in {view.request_id for view in running}

    def test_budget_is_positive(self, policy_class: type[SchedulerPolicy]) -> None:
        """A step may compute at least one token.

        If it fails: return at least 1, however full the pool is.
        """
        assert policy_class(PolicyInit()).token_budget(self.view()) >= 1

    def test_waiting_long_enough_wins(self, policy_class: type[SchedulerPolicy]) -> None:
        """Against newcomers of whatever kind, a request that has waited for a day comes first.

        If it fails: let the key fall with now - arrival_time, without a bound, so that nobody starves.
        """
        policy, rng = policy_class(PolicyInit()), random.Random(2)
        old = RequestView("old", 0.0, 3, 400, 0, 0, 100, 0)
        now = 86_400.0
        for index in range(50):
            fresh = request_view(rng, str(index))
            newcomer = RequestView(fresh.request_id, now, fresh.priority, fresh.num_prompt_tokens, 0, 0, 100, 0)
            assert policy.key(old, now) < policy.key(newcomer, now)
