"""KV allocation: which blocks hold which tokens. Knows no tensors; the runner executes its copies.

Block 0 is the null block and is never granted. A block is shared by counting references; nobody
writes into a block that two requests own, or whose content is published for prefix hits: the part
of a block that is to be extended is copied first (`BlockCopy`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NULL_BLOCK = 0
"""The reserved block that padding points at."""


@dataclass(frozen=True, slots=True)
class KVInit:
    """All that an allocator is constructed from.

    Attributes:
        num_blocks: blocks in the pool, the null block included.
        block_size: slots (tokens) per block.
        enable_prefix_caching: False: nothing is published, every match is empty.
        options: the validated instance of `Provider.options`, or None.
    """

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True
    options: Any = None


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """Tokens whose KV is wanted. Requests with different salts never share."""

    token_ids: Sequence[int]
    salt: str = ""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest prefix that the cache holds; valid until the next call that changes the allocator.

    Attributes:
        num_tokens: tokens whose KV need not be computed.
        block_ids: the blocks that hold them, in order; the last may be held in part only.
        salt: the query's salt, under which the request's own blocks will be published.
        num_query_tokens: how many tokens were asked for.
    """

    num_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    salt: str = ""
    num_query_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the first `num_tokens` slots of block `src` to block `dst`.

    Copies of one schedule run in the order in which they were granted, and before anything that the
    step writes: a source may be granted to another request, or be the destination of a later copy.
    """

    src: int
    dst: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a successful `allocate` or `fork` granted.

    Attributes:
        block_ids: blocks appended to the request's table by this call, in order.
        copies: copies that must run before the request's next step.
    """

    block_ids: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class KVStats:
    """A snapshot of the pool; counts are blocks unless they say tokens.

    Attributes:
        total: grantable blocks (the null block not counted).
        free: blocks that can be granted now, cached ones included.
        cached: free blocks whose content a later request may still hit.
        used: blocks that at least one request owns.
        wasted_tokens: slots owned by requests beyond their tokens (under one block per request).
        query_tokens: tokens asked for in allocations with a prefix match since the last reset.
        hit_tokens: of those, tokens that were found.
        evictions: cached blocks that were reclaimed.
    """

    total: int
    free: int
    cached: int
    used: int
    wasted_tokens: int
    query_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0


class KVAllocator(ABC):
    """Hands out KV blocks. Every call either succeeds whole or changes nothing."""

    def __init__(self, init: KVInit) -> None:
        self.init = init

    @abstractmethod
    def match_prefix(self, query: PrefixQuery) -> PrefixHit:
        """The longest cached prefix of the query. Pure: no reference is taken, no recency updated."""

    @abstractmethod
    def allocate(self, request_id: str, num_tokens: int, hit: PrefixHit | None = None) -> Allocation | None:
        """Let the request own blocks for `num_tokens` tokens in all; None (and no change) if the pool is short.

        The first call for a request registers it; `hit` lets it adopt the matched blocks and names
        its salt. A hit that ends inside a block is copied (`Allocation.copies`), never written into.
        Later calls grow the request; asking for less than it has is a no-op.
        Raises ValueError for a hit on a request that is already registered.
        """

    @abstractmethod
    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> Allocation | None:
        """Let a new request own the parent's first `num_tokens` tokens: full blocks shared, a partial one copied.

        None (and no change) if the pool is short. Raises KeyError for an unknown parent, ValueError
        if the child exists or the parent holds fewer tokens.
        """

    @abstractmethod
    def blocks(self, request_id: str) -> tuple[int, ...]:
        """The request's block table; empty for an unknown request."""

    @abstractmethod
    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        """Publish the KV of the first `num_computed` tokens, which must be computed, for prefix hits.

        `token_ids` are the request's tokens from its beginning. Idempotent.
        """

    @abstractmethod
    def free(self, request_id: str) -> None:
        """Give up the request's blocks; an unknown request is a no-op. Published blocks stay cached."""

    @abstractmethod
    def discard(self, request_id: str) -> None:
        """As `free`, but withdraw what the request published: its content is not to be trusted."""

    @abstractmethod
    def stats(self) -> KVStats:
        """A snapshot of the pool."""

    def cached_blocks(self) -> tuple[int, ...]:
        """The `stats().cached` blocks, the next to be reclaimed first. Only for people to look at; () if not told."""
        return ()

    @abstractmethod
    def reset(self) -> None:
        """Forget all cached content. Raises RuntimeError while a request owns blocks."""

    @abstractmethod
    def check(self) -> None:
        """Verify every invariant; raises AssertionError with the one that does not hold."""
