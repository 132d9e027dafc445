"""The continuous scheduler under both allocators and both policies."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.contract.kv import KVInit
from quire.contract.scheduling import PolicyInit
from quire.kv.paged import PagedAllocator
from quire.kv.radix import RadixAllocator, RadixOptions
from quire.scheduling.continuous import MAX_PREEMPTIONS, ContinuousScheduler
from quire.scheduling.policies import FcfsPolicy, PriorityOptions, PriorityPolicy
from quire.testing.scheduler import SchedulerConformance
from quire.testing.scheduler_policy import SchedulerPolicyConformance, request_view
from quire.testing.simulation import make_request


class CopyingRadix(RadixAllocator):
    """Shares a single token of a block, so that small blocks are copied too."""

    def __init__(self, init):
        super().__init__(KVInit(init.num_blocks, init.block_size, options=RadixOptions(min_partial_tokens=1)))


ALLOCATORS = [PagedAllocator, CopyingRadix]


@pytest.mark.parametrize("policy_class", [FcfsPolicy, PriorityPolicy])
@pytest.mark.parametrize("allocator_class", ALLOCATORS)
class TestContinuous(SchedulerConformance):
    @pytest.fixture
    def scheduler_class(self):
        return ContinuousScheduler


@pytest.mark.parametrize("policy_class", [FcfsPolicy, PriorityPolicy])
class TestPolicies(SchedulerPolicyConformance):
    pass


@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(6, 25),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 20),
    depth=st.integers(1, 2),
)
@settings(max_examples=80, deadline=None)
def test_any_traffic(seed, blocks, seqs, budget, depth):
    kit, rng = SchedulerConformance(), random.Random(seed)
    for allocator in ALLOCATORS:
        simulation = kit.make(
            ContinuousScheduler, allocator, FcfsPolicy, num_blocks=blocks, max_num_seqs=seqs, budget=budget, depth=depth
        )
        kit.traffic(simulation, rng, num_requests=8)
        simulation.drain()
        if blocks >= 9:  # in a smaller pool long requests end early, by length
            simulation.check_outputs()


def test_preemption_happens_and_is_bounded():
    kit = SchedulerConformance()
    simulation = kit.make(ContinuousScheduler, PagedAllocator, FcfsPolicy, num_blocks=9, max_num_seqs=6, budget=16)
    requests = [make_request(f"r{i}", [i + 1, 5], 20, simulation.clock, seed=i) for i in range(6)]
    for request in requests:
        request.stop_token_ids = frozenset()
        simulation.add(request)
    simulation.drain()
    simulation.check_outputs()
    assert simulation.scheduler.stats().num_preemptions > 0
    assert max(request.num_preemptions for request in requests) <= MAX_PREEMPTIONS


def test_priority_runs_better_requests_first():
    kit = SchedulerConformance()
    simulation = kit.make(ContinuousScheduler, PagedAllocator, PriorityPolicy, max_num_seqs=1)
    for name, priority in (("low", 5), ("high", -1), ("middle", 2)):
        simulation.add(make_request(name, [1, 2], 2, simulation.clock, priority=priority))
    simulation.drain()
    assert sorted(simulation.first_run, key=simulation.first_run.__getitem__) == ["high", "middle", "low"]


def test_ageing_is_an_option():
    rng = random.Random(0)
    old, new = request_view(rng, "old"), request_view(rng, "new")
    quick = PriorityPolicy(PolicyInit(PriorityOptions(seconds_per_level=0.001)))
    first = min((old, new), key=lambda view: view.arrival_time)
    assert min((old, new), key=lambda view: quick.key(view, 60.0)) is first


def test_a_fork_shares_the_prompt():
    kit = SchedulerConformance()
    simulation = kit.make(ContinuousScheduler, PagedAllocator, FcfsPolicy, budget=64)
    prompt = list(range(1, 15))
    for index in range(3):
        parent = "p" if index else None
        simulation.add(
            make_request("p" if not index else f"c{index}", prompt, 6, simulation.clock, seed=index, fork_of=parent)
        )
    computed = 0
    while simulation.scheduler.has_work():
        before = simulation.scheduler.init.allocator.stats().used
        simulation.step()
        computed = max(computed, before)
    simulation.drain()
    simulation.check_outputs()
    assert computed < 3 * 4, "each sequence has a prompt of its own"


class Stingy(PagedAllocator):
    """Refuses one allocation of a named request, when told to."""

    refused = None

    def allocate(self, request_id, num_tokens, hit=None):
        if request_id == self.refused:
            self.refused = None
            return None
        return super().allocate(request_id, num_tokens, hit)


def test_a_request_is_pinned_after_so_many_preemptions():
    simulation = SchedulerConformance().make(ContinuousScheduler, Stingy, FcfsPolicy)
    requests = []
    for name in ("old", "new"):
        requests.append(make_request(name, [3, 4], 40, simulation.clock, seed=5))
        requests[-1].stop_token_ids = frozenset()
        simulation.add(requests[-1])
        simulation.step()
    old, new = requests
    # In a step the running requests are asked in turn; that of "old" is refused once, so another must go.
    for _ in range(MAX_PREEMPTIONS):
        simulation.scheduler.init.allocator.refused = "old"
        simulation.step()
        assert new.slot == -1
        simulation.step()
    assert (old.num_preemptions, new.num_preemptions) == (0, MAX_PREEMPTIONS)
    simulation.scheduler.init.allocator.refused = "old"
    simulation.step()
    assert (old.num_preemptions, new.num_preemptions) == (1, MAX_PREEMPTIONS)
    simulation.drain()
    simulation.check_outputs()
