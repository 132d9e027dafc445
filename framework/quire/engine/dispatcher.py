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
        keys: sizes that the device's graph runner offers.
        support: component -> the graphs it can run in; the weakest decides, and the log names it.
    """

    def __init__(self, keys: Sequence[GraphKey], support: Mapping[str, GraphSupport]) -> None:
        weakest = min(support, key=lambda name: support[name], default=None)
        self.level = support[weakest] if weakest is not None else GraphSupport.ANY
        if keys and self.level is not GraphSupport.ANY:
            logger.info("graphs are limited to %s batches by %s", self.level.name.lower(), weakest)
        self._keys = sorted(key for key in keys if self._allowed(key))

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
