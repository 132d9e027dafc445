"""A model of a KV pool that knows what every slot holds, and drives an allocator at random.

The model keeps the content of each slot as (salt, tokens up to and including that position). An
allocator is right if a request's table always holds its own tokens, whatever was shared, copied,
forked, evicted or freed; and if every call that fails leaves no trace.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.contract.kv import NULL_BLOCK, Allocation, KVAllocator, PrefixHit, PrefixQuery

Content = tuple[str, tuple[int, ...]]
"""What a slot holds: the salt, and the tokens from the request's beginning up to this one."""


@dataclass
class _Request:
    salt: str
    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_adopted: int = 0


class KVModel:
    """Drives an allocator and checks it after every operation.

    Args:
        allocator: the one under test, freshly made.
        seed: of the random choices.
        vocab: tokens are below it; few, so that prefixes meet often.
    """

    def __init__(self, allocator: KVAllocator, seed: int, vocab: int = 3) -> None:
        self.allocator = allocator
        self.rng = random.Random(seed)
        self._vocab = vocab
        self._size = allocator.init.block_size
        self._slots: dict[int, Content] = {}
        self._requests: dict[str, _Request] = {}
        self._count = 0

    def step(self) -> None:
        """One random operation, then every invariant."""
        operations = (self.start, self.start, self.grow, self.grow, self.grow, self.fork, self.free, self.discard)
        self.rng.choice(operations)()
        self.check()

    def start(self) -> None:
        """A request comes with a prompt, takes what the cache has, and computes part of the rest."""
        salt = self.rng.choice(("", "", "tenant"))
        tokens = self._prompt()
        hit = self.allocator.match_prefix(PrefixQuery(tokens[:-1], salt))
        self._check_hit(hit, tokens, salt)
        name = f"r{self._count}"
        self._count += 1
        goal = self.rng.randrange(hit.num_tokens + 1, len(tokens) + 1)
        allocation = self._attempt(lambda: self.allocator.allocate(name, goal, hit))
        if allocation is None:
            return
        request = self._requests[name] = _Request(salt, tokens, hit.num_tokens)
        self._granted(request, allocation, num_adopted=hit.num_tokens // self._size)
        self._compute(name, goal)

    def grow(self) -> None:
        """A request computes some more tokens, perhaps new ones."""
        if not self._requests:
            return
        name = self.rng.choice(list(self._requests))
        request = self._requests[name]
        goal = request.num_computed + self.rng.randrange(1, self._size + 2)
        allocation = self._attempt(lambda: self.allocator.allocate(name, goal))
        if allocation is None:
            return
        while len(request.tokens) < goal:
            request.tokens.append(self.rng.randrange(self._vocab))
        self._granted(request, allocation)
        self._compute(name, goal)

    def fork(self) -> None:
        """A request begins as the copy of another."""
        if not self._requests:
            return
        parent_name = self.rng.choice(list(self._requests))
        parent = self._requests[parent_name]
        count = self.rng.randrange(1, parent.num_computed + 1)
        name = f"r{self._count}"
        self._count += 1
        allocation = self._attempt(lambda: self.allocator.fork(parent_name, name, count))
        if allocation is None:
            return
        child = self._requests[name] = _Request(parent.salt, parent.tokens[:count], count)
        self._granted(child, allocation, num_adopted=count // self._size)

    def free(self) -> None:
        """A request ends."""
        if self._requests:
            name = self.rng.choice(list(self._requests))
            del self._requests[name]
            self.allocator.free(name)
            assert self.allocator.blocks(name) == ()

    def discard(self) -> None:
        """A request fails, seldom; nobody may hit what it computed."""
        if not self._requests or self.rng.random() < 0.8:
            return
        name = self.rng.choice(list(self._requests))
        request = self._requests.pop(name)
        self.allocator.discard(name)
        for block in request.blocks[request.num_adopted :]:
            if not any(block in other.blocks for other in self._requests.values()):
                self._poison(block)

    def drain(self) -> None:
        """End everything; the pool must be whole again."""
        for name in list(self._requests):
            self.allocator.free(name)
        self._requests.clear()
        stats = self.allocator.stats()
        assert (stats.free, stats.used, stats.wasted_tokens) == (stats.total, 0, 0), "blocks were lost"
        self.allocator.check()

    def check(self) -> None:
        """The allocator's own invariants, and the model's view of every request."""
        self.allocator.check()
        stats = self.allocator.stats()
        owned = {block for request in self._requests.values() for block in request.blocks}
        assert stats.total == self.allocator.init.num_blocks - 1
        assert stats.used == len(owned), "used blocks are miscounted"
        assert stats.free == stats.total - stats.used, "free blocks are miscounted"
        if cached := self.allocator.cached_blocks():
            assert len(set(cached)) == len(cached) == stats.cached, "cached blocks are miscounted"
            assert owned.isdisjoint(cached), "an owned block is told to be free"
        for name, request in self._requests.items():
            assert list(self.allocator.blocks(name)) == request.blocks, "the table changed behind the request's back"
        waste = stats.wasted_tokens
        assert 0 <= waste <= len(self._requests) * (self._size - 1), "more than a partial block per request is wasted"

    def _prompt(self) -> list[int]:
        length = self.rng.randrange(1, 5 * self._size)
        known = [request.tokens for request in self._requests.values()]
        if known and self.rng.random() < 0.5:
            base = self.rng.choice(known)
            start = base[: self.rng.randrange(len(base) + 1)]
            return (start + [self.rng.randrange(self._vocab) for _ in range(length)])[: max(1, length)]
        # Few distinct beginnings, so that content meets again after its request has ended.
        beginning = random.Random(self.rng.randrange(4))
        return [beginning.randrange(self._vocab) for _ in range(length)]

    def _attempt(self, call: Callable[[], Allocation | None]) -> Allocation | None:
        before = self.allocator.stats()
        result = call()
        if result is None:
            assert self.allocator.stats() == before, "a refused call left a trace"
        return result

    def _check_hit(self, hit: PrefixHit, tokens: list[int], salt: str) -> None:
        assert hit.num_tokens <= max(0, len(tokens) - 1)
        assert len(hit.block_ids) == -(-hit.num_tokens // self._size)
        for position in range(hit.num_tokens):
            slot = hit.block_ids[position // self._size] * self._size + position % self._size
            assert self._slots.get(slot) == (salt, tuple(tokens[: position + 1])), "a hit on unequal content"

    def _granted(self, request: _Request, allocation: Allocation, num_adopted: int = 0) -> None:
        assert NULL_BLOCK not in allocation.block_ids, "the null block was granted"
        request.num_adopted += num_adopted
        fresh = allocation.block_ids[num_adopted:]
        others = {block for other in self._requests.values() if other is not request for block in other.blocks}
        assert not set(fresh) & (others | set(request.blocks)), "a block was granted twice"
        copied = {
            copy.dst * self._size + offset: self._slots.get(copy.src * self._size + offset)
            for copy in allocation.copies
            for offset in range(copy.num_tokens)
        }
        for block in fresh:
            self._poison(block)
        self._slots.update({slot: content for slot, content in copied.items() if content is not None})
        request.blocks.extend(allocation.block_ids)
        self._check_content(request)

    def _compute(self, name: str, goal: int) -> None:
        request = self._requests[name]
        for position in range(request.num_computed, goal):
            slot = request.blocks[position // self._size] * self._size + position % self._size
            owners = sum(request.blocks[position // self._size] in other.blocks for other in self._requests.values())
            assert owners == 1, "a shared block would be written"
            self._slots[slot] = (request.salt, tuple(request.tokens[: position + 1]))
        request.num_computed = goal
        self._check_content(request)
        self.allocator.commit(name, request.tokens, goal)

    def _check_content(self, request: _Request) -> None:
        for position in range(request.num_computed):
            slot = request.blocks[position // self._size] * self._size + position % self._size
            wanted = (request.salt, tuple(request.tokens[: position + 1]))
            assert self._slots.get(slot) == wanted, f"position {position} holds something else"

    def _poison(self, block: int) -> None:
        for slot in range(block * self._size, (block + 1) * self._size):
            self._slots.pop(slot, None)
