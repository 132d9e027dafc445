"""The `paged` allocator: full blocks are shared by content hash (Kwon et al., SOSP 2023, and vLLM's prefix cache).

A block's digest chains its parent's, its salt and its tokens: 128 bits of BLAKE2b, so that two
contents meet by chance less than once in 2^64 blocks and nobody can construct a collision.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from quire.contract.kv import KVInit, PrefixHit, PrefixQuery
from quire.kv.index import PrefixIndex, Table
from quire.kv.pool import PooledAllocator

DIGEST_BYTES = 16


class PagedAllocator(PooledAllocator):
    """Hash blocks with reference counts and least-recently-used eviction."""

    def __init__(self, init: KVInit) -> None:
        super().__init__(init, HashIndex(init.block_size))


class HashIndex(PrefixIndex):
    """Digest of a chain of full blocks -> the block that holds its last link."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def match(self, query: PrefixQuery) -> PrefixHit:
        size, blocks = self._block_size, []
        digest = _root(query.salt)
        for start in range(0, len(query.token_ids) - size + 1, size):
            digest = _chain(digest, query.token_ids[start : start + size])
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return PrefixHit(len(blocks) * size, tuple(blocks), query.salt, len(query.token_ids))

    def cursor(self, salt: str, token_ids: Sequence[int], num_blocks: int) -> bytes:
        digest = _root(salt)
        for start in range(0, num_blocks * self._block_size, self._block_size):
            digest = _chain(digest, token_ids[start : start + self._block_size])
        return digest

    def publish(self, table: Table, tokens: tuple[int, ...]) -> None:
        table.cursor = _chain(table.cursor, tokens)
        block = table.blocks[table.num_published]
        # The same content may have been computed twice at once; the first copy stays the published one.
        if table.cursor not in self._block_of and block not in self._digest_of:
            self._block_of[table.cursor] = block
            self._digest_of[block] = table.cursor

    def publish_tail(self, table: Table) -> None:
        """Only full blocks have a hash."""

    def withdraw(self, block: int) -> list[int]:
        digest = self._digest_of.pop(block, None)
        if digest is None:
            return []
        del self._block_of[digest]
        return [block] if self.unpark(block) else []

    def is_published(self, block: int) -> bool:
        return block in self._digest_of

    def clear(self) -> None:
        self._block_of.clear()
        self._digest_of.clear()
        self._parked.clear()

    def check(self) -> None:
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of, (
            "the hash map is not one to one"
        )
        assert self._parked.keys() <= self._digest_of.keys(), "a parked block is not published"


def _root(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES, person=b"quire-salt").digest()


def _chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()
