"""Chooses the padded size that a step runs at, so that a captured graph can be replayed for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from quire.contract.attention import GraphSupport
from quire.contract.device import GraphKey

logger = logging.getLogger(__name__)


class GraphDispatcher:
    """Picks the smallest captured size that a step fits into.

    Args:
        keys: sizes that the device's graph runner offers; those beyond the limits are cut to them.
        support: component -> the graphs it can run in; the weakest decides, and the log names it.
        max_num_reqs: rows of the largest step. max_num_tokens: its tokens.
    """

    def __init__(
        self, keys: Sequence[GraphKey], support: Mapping[str, GraphSupport], max_num_reqs: int, max_num_tokens: int
    ) -> None:
        weakest = min(support, key=lambda name: support[name], default=None)
        self.level = support[weakest] if weakest is not None else GraphSupport.ANY
        if keys and self.level is GraphSupport.NEVER:
            logger.info("no graphs are captured, as %s cannot run inside one", weakest)
        elif keys and self.level is GraphSupport.UNIFORM:
            logger.info("graphs are limited to steps of equal query lengths by %s", weakest)
        clipped = {_clipped(key, max_num_reqs, max_num_tokens) for key in keys if self._allowed(key)}
        self._keys = sorted(key for key in clipped if key.num_tokens)

    @property
    def keys(self) -> tuple[GraphKey, ...]:
        """The sizes in use, the largest first, as they are best captured: smaller ones reuse their memory."""
        return tuple(sorted(self._keys, key=lambda key: (key.num_tokens, key.num_reqs), reverse=True))

    def forget(self, key: GraphKey) -> None:
        """Use this size no more: it could not be captured."""
        self._keys.remove(key)

    def pick(self, uniform_query_len: int, num_reqs: int, num_tokens: int) -> GraphKey | None:
        """The smallest key that holds the step; None: run eagerly at its exact size."""
        fitting = (
            key
            for key in self._keys
            if key.num_reqs >= num_reqs
            and key.num_tokens >= num_tokens
            and key.uniform_query_len in (0, uniform_query_len)
        )
        return min(fitting, key=lambda key: (key.num_tokens, key.num_reqs, -key.uniform_query_len), default=None)

    def _allowed(self, key: GraphKey) -> bool:
        if key.uniform_query_len:
            return self.level is not GraphSupport.NEVER
        return self.level is GraphSupport.ANY


def _clipped(key: GraphKey, max_num_reqs: int, max_num_tokens: int) -> GraphKey:
    """The key cut to the largest step; a uniform one to whole rows, a mixed one to a token per row at least."""
    length = key.uniform_query_len
    if not length:
        num_tokens = min(key.num_tokens, max_num_tokens)
        return GraphKey(0, min(key.num_reqs, max_num_reqs, num_tokens), num_tokens)
    num_reqs = min(key.num_reqs, max_num_reqs, max_num_tokens // length)
    return GraphKey(length, num_reqs, num_reqs * length)
