"""The `radix` allocator: a radix tree over tokens (Zheng et al., SGLang, 2023) whose nodes are blocks.

Beside full blocks it shares the part of a prefix that ends inside a block: the block is copied, and
the copy extended. That pays from a few tokens on, since a copy costs far less than computing them.
A request's last, partly filled block is kept as a leaf, so the next turn of a chat finds it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from quire.contract.kv import KVInit, PrefixHit, PrefixQuery
from quire.kv.index import PrefixIndex, Table
from quire.kv.pool import PooledAllocator


class RadixOptions(BaseModel):
    """Options of the `radix` allocator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_partial_tokens: int = Field(default=4, ge=1)
    """Fewest tokens of a partly matching block for which it is copied."""


class RadixAllocator(PooledAllocator):
    """Blocks in a radix tree, with reference counts and least-recently-used eviction."""

    def __init__(self, init: KVInit) -> None:
        super().__init__(init, RadixIndex(init.block_size, init.options or RadixOptions()))


@dataclass(slots=True, eq=False)
class _Node:
    """One block of the tree; the root of each salt has block -1. A node with fewer tokens than a block is a leaf."""

    block: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    ordered: list[tuple[int, ...]] = field(default_factory=list)
    """The keys of `children` in lexical order, for `closest`."""
    salt: str = ""
    """Of a root: the salt of its tree."""

    def add(self, child: _Node) -> None:
        self.children[child.tokens] = child
        bisect.insort(self.ordered, child.tokens)

    def remove(self, child: _Node) -> None:
        del self.children[child.tokens]
        del self.ordered[bisect.bisect_left(self.ordered, child.tokens)]

    def closest(self, tokens: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The child that shares the longest prefix with `tokens`, and its length.

        In lexical order it stands next to where `tokens` would: what lies between two sequences shares
        with either at least what they share with each other.
        """
        at = bisect.bisect_left(self.ordered, tokens)
        near = self.ordered[max(0, at - 1) : at + 1]
        if not near:
            return None, 0
        best = max(near, key=lambda key: _common_prefix(key, tokens))
        return self.children[best], _common_prefix(best, tokens)


class RadixIndex(PrefixIndex):
    """One tree per salt. A tree goes when its last block does: callers choose salts, and they must not pile up."""

    takes_tails = True

    def __init__(self, block_size: int, options: RadixOptions) -> None:
        super().__init__()
        self._block_size = block_size
        self._min_partial = options.min_partial_tokens
        self._roots: dict[str, _Node] = {}
        self._node_of: dict[int, _Node] = {}

    def match(self, query: PrefixQuery) -> PrefixHit:
        size, count = self._block_size, len(query.token_ids)
        node, blocks, start = self._roots.get(query.salt), [], 0
        while node is not None and start + size <= count:
            child = node.children.get(tuple(query.token_ids[start : start + size]))
            if child is None:
                break
            blocks.append(child.block)
            node, start = child, start + size
        if node is not None:
            best, length = node.closest(tuple(query.token_ids[start : start + size]))
            if best is not None and length >= self._min_partial:
                blocks.append(best.block)
                start += length
        return PrefixHit(start, tuple(blocks), query.salt, count)

    def cursor(self, salt: str, token_ids: Sequence[int], num_blocks: int) -> _Node | None:
        node: _Node | None = self._root(salt)
        for start in range(0, num_blocks * self._block_size, self._block_size):
            if node is None:
                return None
            node = node.children.get(tuple(token_ids[start : start + self._block_size]))
        return node

    def publish(self, table: Table, tokens: tuple[int, ...]) -> None:
        table.cursor = self._insert(table.cursor, tokens, table.blocks[table.num_published])

    def publish_tail(self, table: Table) -> None:
        if len(table.tail) >= self._min_partial:
            self._insert(table.cursor, table.tail, table.blocks[table.num_published])

    def withdraw(self, block: int) -> list[int]:
        node = self._node_of.get(block)
        if node is None:
            return []
        if node.parent is not None:
            node.parent.remove(node)
            if node.parent.block == -1 and not node.parent.children:
                del self._roots[node.parent.salt]
        return self._cut(node)

    def is_published(self, block: int) -> bool:
        return block in self._node_of

    def clear(self) -> None:
        self._roots.clear()
        self._node_of.clear()
        self._parked.clear()

    def check(self) -> None:
        assert all(root.children for root in self._roots.values()), "the root of an empty tree is kept"
        seen: dict[int, _Node] = {}
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            assert node.block not in seen, f"block {node.block} stands twice in the tree"
            assert node.parent is not None, "an inner node has no parent"
            assert node.parent.children.get(node.tokens) is node, "a node is not its parent's child"
            assert len(node.tokens) == self._block_size or not node.children, "a partial block has children"
            assert node.ordered == sorted(node.children), "the order of a node's children is wrong"
            seen[node.block] = node
            stack.extend(node.children.values())
        assert seen == self._node_of, "the tree and its index differ"
        assert self._parked.keys() <= self._node_of.keys(), "a parked block is not published"

    def _root(self, salt: str) -> _Node:
        """The root of the salt's tree; a new one enters `_roots` with its first block."""
        return self._roots.get(salt) or _Node(-1, (), None, salt=salt)

    def _insert(self, parent: _Node | None, tokens: tuple[int, ...], block: int) -> _Node | None:
        """The node of these tokens below `parent`; None if the way to it was evicted meanwhile."""
        if parent is None or self._is_gone(parent):
            return None
        if parent.block == -1:
            parent = self._roots.get(parent.salt, parent)
        child = parent.children.get(tokens)
        if child is None:
            if block in self._node_of:
                return None
            if parent.block == -1:
                self._roots[parent.salt] = parent
            child = self._node_of[block] = _Node(block, tokens, parent)
            parent.add(child)
        return child

    def _is_gone(self, node: _Node) -> bool:
        return node.block != -1 and self._node_of.get(node.block) is not node

    def _cut(self, top: _Node) -> list[int]:
        """Unpublish a subtree; returns its parked blocks."""
        worthless, stack = [], [top]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            node.children.clear()
            node.ordered.clear()
            node.parent = None
            del self._node_of[node.block]
            if self.unpark(node.block):
                worthless.append(node.block)
        return worthless


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
