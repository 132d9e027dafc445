import pytest
from quire.plugin import PolicyInit, RequestView, SchedulerView
from quire.testing.scheduler_policy import SchedulerPolicyConformance
from quire_shortest_job.policy import ShortestJobOptions, ShortestJobPolicy

VIEW = SchedulerView(60.0, 3, 5, 10, 20, 8, 256)


class TestShortestJob(SchedulerPolicyConformance):
    @pytest.fixture
    def policy_class(self):
        return ShortestJobPolicy


def job(name, prompt, *, arrival=0.0, max_tokens=10, output=0, computed=0):
    return RequestView(name, arrival, 0, prompt, output, computed, max_tokens, 0)


def test_the_shorter_of_two_runs_first():
    policy = ShortestJobPolicy(PolicyInit())
    assert policy.key(job("short", 10), 1.0) < policy.key(job("long", 11), 1.0)


@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_no_wait_for_newcomers_is_longer_than_the_size_allows(rate):
    policy = ShortestJobPolicy(PolicyInit(ShortestJobOptions(tokens_per_second=rate)))
    large, size = job("large", 5000), 5010
    for late, comes_first in ((size / rate + 0.1, True), (size / rate * 0.5, False)):
        newcomer = job("new", 0, arrival=late, max_tokens=0)
        assert (policy.key(large, late) < policy.key(newcomer, late)) is comes_first


def test_output_can_be_left_out_of_the_size():
    policy = ShortestJobPolicy(PolicyInit(ShortestJobOptions(output_weight=0.0)))
    assert policy.key(job("a", 5, max_tokens=9), 0.0) == policy.key(job("b", 5, max_tokens=900), 0.0)


def test_the_victim_has_computed_least():
    running = [job("a", 100, computed=100), job("b", 10, computed=16), job("c", 90, computed=16)]
    assert ShortestJobPolicy(PolicyInit()).pick_victim(running, VIEW) == "c"
