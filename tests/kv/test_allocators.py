"""Both allocators pass the kit; a long fuzz; what only the radix tree does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from quire.contract.kv import KVInit, PrefixHit, PrefixQuery
from quire.kv.paged import PagedAllocator
from quire.kv.radix import RadixAllocator, RadixOptions
from quire.testing.kv_allocator import KVAllocatorConformance
from quire.testing.kv_model import KVModel


class CopyingRadix(RadixAllocator):
    """Shares a single token of a block, so that small blocks are copied too."""

    def __init__(self, init):
        super().__init__(KVInit(init.num_blocks, init.block_size, options=RadixOptions(min_partial_tokens=1)))


ALLOCATORS = [PagedAllocator, RadixAllocator]
FUZZ_OPERATIONS = 100_000
"""Per allocator; two allocators make 200,000 in the suite."""


@pytest.mark.parametrize("allocator_class", ALLOCATORS)
class TestAllocators(KVAllocatorConformance):
    pass


@pytest.mark.parametrize("allocator_class", [PagedAllocator, CopyingRadix])
def test_fuzz(allocator_class):
    per_pool = 5_000
    for seed in range(FUZZ_OPERATIONS // per_pool):
        init = KVInit(3 + seed % 7, 1 + seed % 4)
        model = KVModel(allocator_class(init), seed, vocab=2 + seed % 2)
        for _ in range(per_pool):
            model.step()
        model.drain()


@given(seed=st.integers(0, 2**32), blocks=st.integers(2, 12), size=st.integers(1, 5), steps=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_any_short_history(seed, blocks, size, steps):
    for allocator_class in (PagedAllocator, CopyingRadix):
        model = KVModel(allocator_class(KVInit(blocks, size)), seed)
        for _ in range(steps):
            model.step()
        model.drain()


def radix(num_blocks=9, block_size=8, min_partial=2):
    return RadixAllocator(KVInit(num_blocks, block_size, options=RadixOptions(min_partial_tokens=min_partial)))


def test_radix_shares_the_part_of_a_block():
    allocator = radix()
    first = KVAllocatorConformance.run(allocator, "a", list(range(16)))
    hit = allocator.match_prefix(PrefixQuery([*range(12), 90, 91, 92]))
    assert (hit.num_tokens, hit.block_ids) == (12, first)
    allocation = allocator.allocate("b", 15, hit)
    assert allocation is not None
    (copy,) = allocation.copies
    assert (copy.src, copy.num_tokens) == (first[1], 4)
    assert copy.dst == allocator.blocks("b")[1] != first[1]


def test_radix_finds_the_last_partial_block_of_an_ended_request():
    allocator = radix()
    KVAllocatorConformance.run(allocator, "turn 1", list(range(13)))
    allocator.free("turn 1")
    assert allocator.match_prefix(PrefixQuery([*range(13), 50, 51])).num_tokens == 13


def test_radix_ignores_parts_that_do_not_pay():
    allocator = radix(min_partial=5)
    KVAllocatorConformance.run(allocator, "a", list(range(16)))
    assert allocator.match_prefix(PrefixQuery([*range(12), 90])).num_tokens == 8


PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@given(prompts=st.lists(PROMPT, min_size=1, max_size=12), asked=PROMPT)
@settings(max_examples=150, deadline=None)
def test_radix_finds_the_longest_prefix_there_is(prompts, asked):
    allocator = radix(num_blocks=80, block_size=4, min_partial=1)
    for number, prompt in enumerate(prompts):
        KVAllocatorConformance.run(allocator, str(number), prompt)
        allocator.free(str(number))
    longest = max(n for prompt in prompts for n in range(len(asked) + 1) if prompt[:n] == asked[:n])
    assert allocator.match_prefix(PrefixQuery(asked)).num_tokens == longest
    allocator.check()


def test_radix_salts_do_not_pile_up():
    allocator = radix(num_blocks=4)
    for index in range(20):
        KVAllocatorConformance.run(allocator, f"r{index}", list(range(9)), salt=f"tenant {index}")
        allocator.free(f"r{index}")
    assert len(allocator._index._roots) <= 3
    assert allocator.match_prefix(PrefixQuery(list(range(9)), "tenant 19")).num_tokens >= 8


def test_paged_shares_full_blocks_only():
    allocator = PagedAllocator(KVInit(9, 8))
    KVAllocatorConformance.run(allocator, "a", list(range(16)))
    assert allocator.match_prefix(PrefixQuery([*range(12), 90])).num_tokens == 8


def test_two_requests_that_compute_the_same_at_once_publish_it_once():
    for allocator_class in ALLOCATORS:
        allocator = allocator_class(KVInit(9, 4))
        for name in ("a", "b"):
            assert allocator.allocate(name, 8, PrefixHit()) is not None
        for name in ("a", "b"):
            allocator.commit(name, list(range(8)), 8)
        published = allocator.match_prefix(PrefixQuery(list(range(8)))).block_ids
        assert published == allocator.blocks("a")
        for name in ("a", "b"):
            allocator.free(name)
        assert allocator.stats().cached == 2
        allocator.check()


@pytest.mark.parametrize(("blocks", "size"), [(1, 4), (4, 0)])
def test_pools_that_cannot_work_are_refused(blocks, size):
    with pytest.raises(ValueError, match="pool"):
        PagedAllocator(KVInit(blocks, size))


class AllocatorMachine(RuleBasedStateMachine):
    """Hypothesis chooses the operations, and shrinks a history that breaks an invariant."""

    allocator_class = PagedAllocator
    seeds = st.integers(0, 2**32)

    @initialize(blocks=st.integers(2, 12), size=st.integers(1, 5))
    def begin(self, blocks, size):
        self.model = KVModel(self.allocator_class(KVInit(blocks, size)), seed=0)

    def act(self, seed, name):
        self.model.rng.seed(seed)
        getattr(self.model, name)()

    @rule(seed=seeds)
    def start(self, seed):
        self.act(seed, "start")

    @rule(seed=seeds)
    def grow(self, seed):
        self.act(seed, "grow")

    @rule(seed=seeds)
    def fork(self, seed):
        self.act(seed, "fork")

    @rule(seed=seeds)
    def free(self, seed):
        self.act(seed, "free")

    @rule(seed=seeds)
    def discard(self, seed):
        self.act(seed, "discard")

    @invariant()
    def holds(self):
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self):
        if hasattr(self, "model"):
            self.model.drain()


class RadixMachine(AllocatorMachine):
    allocator_class = RadixAllocator


TestPagedMachine = AllocatorMachine.TestCase
TestRadixMachine = RadixMachine.TestCase
for machine in (TestPagedMachine, TestRadixMachine):
    machine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
