"""What both KV allocators share: reference counts, the free list, request tables. A prefix index differs.

Where a block can be:

    granted      ref > 0             owned by requests; published or not
    parked       ref = 0, published  free to grant, but a prefix may still hit it (kept by the index)
    plain        ref = 0             free to grant, content worthless

Plain blocks are granted first, then the least recently parked one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from quire.contract.kv import (
    NULL_BLOCK,
    Allocation,
    BlockCopy,
    KVAllocator,
    KVInit,
    KVStats,
    PrefixHit,
    PrefixQuery,
)
from quire.kv.index import PrefixIndex, Table

NOTHING = Allocation()
"""What a request is granted that has room already."""


class PooledAllocator(KVAllocator):
    """A KV allocator over a prefix index."""

    def __init__(self, init: KVInit, index: PrefixIndex) -> None:
        super().__init__(init)
        if init.num_blocks < 2 or init.block_size < 1:
            raise ValueError(f"a pool needs 2 blocks and a block 1 slot; got {init.num_blocks} and {init.block_size}")
        self._block_size = init.block_size
        self._index = index
        self._refs = [0] * init.num_blocks
        self._plain = deque(range(1, init.num_blocks))
        self._tables: dict[str, Table] = {}
        self._wasted = 0
        self._query_tokens = self._hit_tokens = self._evictions = 0

    def match_prefix(self, query: PrefixQuery) -> PrefixHit:
        if not self.init.enable_prefix_caching:
            return PrefixHit(salt=query.salt, num_query_tokens=len(query.token_ids))
        return self._index.match(query)

    def allocate(self, request_id: str, num_tokens: int, hit: PrefixHit | None = None) -> Allocation | None:
        table = self._tables.get(request_id)
        if table is None:
            return self._register(request_id, num_tokens, hit or PrefixHit())
        if hit is not None:
            raise ValueError(f"request {request_id!r} owns blocks already; a hit comes with its first allocation")
        if num_tokens <= len(table.blocks) * self._block_size:  # nearly every token of every request comes here
            grown = max(0, num_tokens - table.num_tokens)
            table.num_tokens += grown
            self._wasted -= grown
            return NOTHING
        granted = self._grant(self._blocks_for(num_tokens) - len(table.blocks))
        if granted is None:
            return None
        self._append(table, granted, num_tokens)
        return Allocation(tuple(granted))

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> Allocation | None:
        parent = self._tables[parent_id]
        if child_id in self._tables:
            raise ValueError(f"request {child_id!r} owns blocks already")
        if num_tokens > parent.num_tokens:
            raise ValueError(f"request {parent_id!r} holds {parent.num_tokens} tokens, not {num_tokens}")
        full, rest = divmod(num_tokens, self._block_size)
        granted = self._grant(1 if rest else 0)
        if granted is None:
            return None
        shared = parent.blocks[:full]
        for block in shared:
            self._refs[block] += 1
        child = Table(parent.salt, list(shared), full * self._block_size, num_adopted=full)
        child.num_published = min(full, parent.num_published)
        if child.num_published == parent.num_published:
            child.cursor, child.has_cursor = parent.cursor, parent.has_cursor
        self._tables[child_id] = child
        self._append(child, granted, num_tokens)
        copies = tuple(BlockCopy(parent.blocks[full], block, rest) for block in granted)
        return Allocation((*shared, *granted), copies)

    def blocks(self, request_id: str) -> tuple[int, ...]:
        table = self._tables.get(request_id)
        return () if table is None else tuple(table.blocks)

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        if not self.init.enable_prefix_caching:
            return
        table, size = self._tables[request_id], self._block_size
        full = num_computed // size
        if table.cursor is None and (full > table.num_published or not table.has_cursor):
            table.cursor = self._index.cursor(table.salt, token_ids, table.num_published)
            table.has_cursor = True
        while table.num_published < full:
            start = table.num_published * size
            self._index.publish(table, tuple(token_ids[start : start + size]))
            table.num_published += 1
        if self._index.takes_tails:
            table.tail = tuple(token_ids[full * size : num_computed])

    def free(self, request_id: str) -> None:
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        if table.tail:
            self._index.publish_tail(table)
        self._release(table)

    def discard(self, request_id: str) -> None:
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        for block in table.blocks[table.num_adopted :]:
            self._plain.extend(self._index.withdraw(block))
        self._release(table)

    def stats(self) -> KVStats:
        total = self.init.num_blocks - 1
        cached = self._index.num_parked
        free = len(self._plain) + cached
        return KVStats(
            total=total,
            free=free,
            cached=cached,
            used=total - free,
            wasted_tokens=self._wasted,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            evictions=self._evictions,
        )

    def cached_blocks(self) -> tuple[int, ...]:
        return tuple(self._index.parked())

    def reset(self) -> None:
        if self._tables:
            raise RuntimeError(f"{len(self._tables)} requests own blocks; the cache is reset when none does")
        self._plain.extend(self._index.parked())
        self._index.clear()
        self._query_tokens = self._hit_tokens = self._evictions = 0

    def check(self) -> None:
        self._index.check()
        owners = [0] * self.init.num_blocks
        for request_id, table in self._tables.items():
            assert len(set(table.blocks)) == len(table.blocks), f"{request_id!r} has a block twice"
            assert len(table.blocks) == self._blocks_for(table.num_tokens), f"{request_id!r} has too many blocks"
            for block in table.blocks:
                owners[block] += 1
        assert owners == self._refs, "reference counts differ from the tables"
        assert owners[NULL_BLOCK] == 0, "the null block was granted"
        plain, parked = set(self._plain), set(self._index.parked())
        assert len(plain) == len(self._plain), "a block stands twice in the free list"
        assert not plain & parked, "a block is plain and parked"
        free = plain | parked
        assert NULL_BLOCK not in free, "the null block is free to grant"
        assert all((owners[block] == 0) == (block in free) for block in range(1, self.init.num_blocks)), (
            "a block is lost"
        )
        assert not any(self._index.is_published(block) for block in plain), "a plain block is published"
        slack = sum(len(table.blocks) * self._block_size - table.num_tokens for table in self._tables.values())
        assert slack == self._wasted, "wasted tokens are miscounted"

    def _register(self, request_id: str, num_tokens: int, hit: PrefixHit) -> Allocation | None:
        full, rest = divmod(hit.num_tokens, self._block_size)
        adopted, source = hit.block_ids[:full], hit.block_ids[full] if rest else None
        num_tokens = max(num_tokens, hit.num_tokens)
        count = self._blocks_for(num_tokens) - full
        num_hit_parked = sum(map(self._index.is_parked, hit.block_ids))
        if count > len(self._plain) + self._index.num_parked - num_hit_parked:
            return None
        # Unparked before granting, so that making room cannot evict what was hit.
        unparked = {block for block in hit.block_ids if self._index.unpark(block)}
        granted = self._grant(count)
        assert granted is not None
        if source in unparked:
            self._index.park(source)
        for block in adopted:
            self._refs[block] += 1
        table = Table(hit.salt, list(adopted), full * self._block_size, num_adopted=full, num_published=full)
        self._tables[request_id] = table
        self._append(table, granted, num_tokens)
        self._query_tokens += hit.num_query_tokens
        self._hit_tokens += hit.num_tokens
        copies = () if source is None else (BlockCopy(source, granted[0], rest),)
        return Allocation((*adopted, *granted), copies)

    def _grant(self, count: int) -> list[int] | None:
        """Blocks with one reference each; None, and no change, if there are not that many."""
        if count > len(self._plain) + self._index.num_parked:
            return None
        granted = []
        for _ in range(count):
            if not self._plain:
                self._plain.extend(self._index.withdraw(self._index.oldest()))
                self._evictions += 1
            block = self._plain.popleft()
            self._refs[block] = 1
            granted.append(block)
        return granted

    def _append(self, table: Table, granted: Sequence[int], num_tokens: int) -> None:
        before = len(table.blocks) * self._block_size - table.num_tokens
        table.blocks.extend(granted)
        table.num_tokens = max(table.num_tokens, num_tokens)
        self._wasted += len(table.blocks) * self._block_size - table.num_tokens - before

    def _release(self, table: Table) -> None:
        self._wasted -= len(table.blocks) * self._block_size - table.num_tokens
        # Later blocks are parked first, so that a prefix outlives what followed it.
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._index.is_published(block):
                self._index.park(block)
            else:
                self._plain.append(block)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
