"""What the allocators look prefixes up in: published blocks, and those of them that nobody owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quire.contract.kv import PrefixHit, PrefixQuery


@dataclass(slots=True)
class Table:
    """One request's blocks.

    Attributes:
        salt: requests of other salts never share with it.
        blocks: its block table.
        num_tokens: tokens it asked room for.
        num_adopted: leading blocks that it took over instead of computing them.
        num_published: leading blocks that the index has seen.
        cursor: the index's own bookmark at that point; None: not known, or lost to eviction.
        has_cursor: whether the bookmark was ever asked for.
        tail: computed tokens in the block after the published ones.
    """

    salt: str
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_adopted: int = 0
    num_published: int = 0
    cursor: Any = None
    has_cursor: bool = False
    tail: tuple[int, ...] = ()


class PrefixIndex(ABC):
    """Knows which published block holds which tokens, and which of them are parked, oldest first."""

    takes_tails: ClassVar[bool] = False
    """Whether `publish_tail` takes anything in; if not, the tokens that it would need are not kept."""

    def __init__(self) -> None:
        self._parked: OrderedDict[int, None] = OrderedDict()

    @abstractmethod
    def match(self, query: PrefixQuery) -> PrefixHit:
        """The longest published prefix."""

    @abstractmethod
    def cursor(self, salt: str, token_ids: Sequence[int], num_blocks: int) -> Any:
        """The bookmark after the first `num_blocks` full blocks of these tokens."""

    @abstractmethod
    def publish(self, table: Table, tokens: tuple[int, ...]) -> None:
        """Take in the table's next full block (at `table.num_published`) and move its cursor."""

    @abstractmethod
    def publish_tail(self, table: Table) -> None:
        """Take in the table's partly filled block, if the index can serve such."""

    @abstractmethod
    def withdraw(self, block: int) -> list[int]:
        """Unpublish a block; returns parked blocks that became worthless with it, itself included."""

    @abstractmethod
    def is_published(self, block: int) -> bool:
        """Whether a prefix could hit the block."""

    def park(self, block: int) -> None:
        """Nobody owns this published block any more."""
        self._parked[block] = None

    def unpark(self, block: int) -> bool:
        """Somebody owns it again; False if it was not parked."""
        return self._parked.pop(block, self) is None

    def is_parked(self, block: int) -> bool:
        """Whether it is parked."""
        return block in self._parked

    def oldest(self) -> int:
        """The least recently parked block. Raises StopIteration if none is."""
        return next(iter(self._parked))

    @property
    def num_parked(self) -> int:
        """How many blocks are parked."""
        return len(self._parked)

    def parked(self) -> Iterable[int]:
        """All parked blocks."""
        return self._parked.keys()

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def check(self) -> None:
        """Verify the index's own invariants."""
