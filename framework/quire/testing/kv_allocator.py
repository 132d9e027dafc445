"""Conformance of KV allocators: a random walk held against `kv_model`, and each promise by itself."""

from __future__ import annotations

import pytest

from quire.contract.kv import KVAllocator, KVInit, PrefixHit, PrefixQuery
from quire.testing.kv_model import KVModel


class KVAllocatorConformance:
    """What every KV allocator must hold. Subclass, and give the fixture `allocator_class`."""

    num_operations = 2_000
    """Operations of the random walk, per pool shape."""

    @pytest.fixture
    def allocator_class(self) -> type[KVAllocator]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `allocator_class`")

    def make(self, allocator_class: type[KVAllocator], num_blocks: int = 9, block_size: int = 4) -> KVAllocator:
        return allocator_class(KVInit(num_blocks, block_size))

    @pytest.mark.parametrize(("num_blocks", "block_size"), [(2, 1), (6, 2), (9, 4), (30, 3), (8, 8)])
    def test_random_walk(self, allocator_class: type[KVAllocator], num_blocks: int, block_size: int) -> None:
        """Random starts, growth, forks, frees and failures in pools that are always short; after each the model's
        invariants hold: no block lost or granted twice, the null block never, no hit on unequal content, no shared
        block written, a refused call without a trace.

        If it fails: the assertion names the invariant; drive `KVModel` with the same seed and print the operations
        before it.
        """
        model = KVModel(self.make(allocator_class, num_blocks, block_size), seed=num_blocks)
        for _ in range(self.num_operations):
            model.step()
        model.drain()

    def test_shares_full_blocks_without_copying(self, allocator_class: type[KVAllocator]) -> None:
        """A second request with the same beginning owns the very blocks of the first.

        If it fails: `commit` publishes full blocks under their content and all before it, `match_prefix` finds them,
        `allocate` takes a reference to each.
        """
        allocator = self.make(allocator_class)
        first = self.run(allocator, "a", list(range(10)))
        hit = allocator.match_prefix(PrefixQuery([*range(8), 77, 78]))
        assert hit.num_tokens >= 8
        assert hit.block_ids[:2] == first[:2]
        assert allocator.allocate("b", 10, hit) is not None
        assert allocator.blocks("b")[:2] == first[:2]
        assert allocator.stats().used == 4

    def test_salts_do_not_share(self, allocator_class: type[KVAllocator]) -> None:
        """The same tokens under another salt are not found (a side channel between tenants).

        If it fails: let the key of a request's first block contain the salt of its hit.
        """
        allocator = self.make(allocator_class)
        self.run(allocator, "a", list(range(8)), salt="one")
        assert allocator.match_prefix(PrefixQuery(list(range(8)), "two")).num_tokens == 0
        assert allocator.match_prefix(PrefixQuery(list(range(8)), "one")).num_tokens == 8

    def test_caching_can_be_switched_off(self, allocator_class: type[KVAllocator]) -> None:
        """Without prefix caching nothing is ever found.

        If it fails: with `init.enable_prefix_caching` False publish nothing in `commit`.
        """
        allocator = allocator_class(KVInit(9, 4, enable_prefix_caching=False))
        self.run(allocator, "a", list(range(8)))
        assert allocator.match_prefix(PrefixQuery(list(range(8)))).num_tokens == 0
        allocator.free("a")
        assert allocator.stats().cached == 0

    def test_least_recently_used_goes_first(self, allocator_class: type[KVAllocator]) -> None:
        """What was used last is found longest, and a prefix outlives what followed it.

        If it fails: give blocks back to the end of the queue of free ones, a request's last block first, and reclaim
        from its beginning.
        """
        allocator = self.make(allocator_class, num_blocks=7)
        for name, start in (("a", 0), ("b", 100)):
            self.run(allocator, name, list(range(start, start + 12)))
            allocator.free(name)
        allocator.allocate("new", 8)
        assert allocator.match_prefix(PrefixQuery(list(range(100, 112)))).num_tokens == 12
        assert allocator.match_prefix(PrefixQuery(list(range(12)))).num_tokens == 4
        assert allocator.stats().evictions == 2

    def test_refusal_leaves_no_trace(self, allocator_class: type[KVAllocator]) -> None:
        """A request that does not fit gets None, and the cache still holds what it held.

        If it fails: count what is needed and free before anything is changed; adopted blocks that were free count as
        needed.
        """
        allocator = self.make(allocator_class)
        self.run(allocator, "a", list(range(16)))
        allocator.free("a")
        hit = allocator.match_prefix(PrefixQuery(list(range(16))))
        assert allocator.allocate("b", 4 * 9, hit) is None
        assert allocator.blocks("b") == ()
        assert allocator.match_prefix(PrefixQuery(list(range(16)))) == hit
        allocator.check()

    def test_fork_copies_the_partial_block(self, allocator_class: type[KVAllocator]) -> None:
        """A fork shares full blocks and copies the rest, so that both may go on writing.

        If it fails: grant one block for the partial one and return a `BlockCopy`; refuse unknown parents with KeyError,
        a known child or too many tokens with ValueError.
        """
        allocator = self.make(allocator_class)
        parent = self.run(allocator, "a", list(range(10)))
        fork = allocator.fork("a", "b", 10)
        assert fork is not None
        assert fork.block_ids[:2] == parent[:2]
        assert [(copy.src, copy.dst, copy.num_tokens) for copy in fork.copies] == [(parent[2], fork.block_ids[2], 2)]
        with pytest.raises(KeyError):
            allocator.fork("nobody", "c", 1)
        with pytest.raises(ValueError, match="b"):
            allocator.fork("a", "b", 1)
        with pytest.raises(ValueError, match="11"):
            allocator.fork("a", "c", 11)

    def test_discard_withdraws_content(self, allocator_class: type[KVAllocator]) -> None:
        """What a failed request published is not found any more.

        If it fails: remove the blocks that this request published from the index when it is discarded.
        """
        allocator = self.make(allocator_class)
        self.run(allocator, "a", list(range(8)))
        allocator.discard("a")
        assert allocator.match_prefix(PrefixQuery(list(range(8)))).num_tokens == 0
        assert allocator.stats().free == allocator.stats().total

    def test_reset_forgets(self, allocator_class: type[KVAllocator]) -> None:
        """After a reset nothing is found; while a request owns blocks it is refused.

        If it fails: raise RuntimeError while any block is owned, else empty the index.
        """
        allocator = self.make(allocator_class)
        self.run(allocator, "a", list(range(8)))
        with pytest.raises(RuntimeError):
            allocator.reset()
        allocator.free("a")
        allocator.reset()
        assert allocator.match_prefix(PrefixQuery(list(range(8)))).num_tokens == 0
        allocator.check()

    def test_hit_belongs_to_the_first_allocation(self, allocator_class: type[KVAllocator]) -> None:
        """A request that owns blocks cannot take over others.

        If it fails: raise ValueError for a hit on a request that is registered.
        """
        allocator = self.make(allocator_class)
        allocator.allocate("a", 3)
        with pytest.raises(ValueError, match="a"):
            allocator.allocate("a", 4, PrefixHit())

    @staticmethod
    def run(allocator: KVAllocator, name: str, tokens: list[int], salt: str = "") -> tuple[int, ...]:
        """Allocate and commit all tokens of a request; its blocks."""
        assert allocator.allocate(name, len(tokens), PrefixHit(salt=salt)) is not None
        allocator.commit(name, tokens, len(tokens))
        return allocator.blocks(name)
