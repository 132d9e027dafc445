"""Calls the observing hooks of each plugin alone; one that fails three times is muted."""

from __future__ import annotations

import logging
from typing import Any

import pluggy

from quire.host.trace import Step

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""How often one plugin's hook may raise before it is not called any more."""


class Observers:
    """All implementations of one hook. Belongs to the thread that calls it."""

    def __init__(self, implementations: list[pluggy.HookImpl], labels: dict[str, str]) -> None:
        self._implementations = list(implementations)
        self._labels = labels
        self._failures: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._implementations)

    def call(self, name: str, **arguments: Any) -> None:
        """Call every implementation of hook `name` that is not muted, in the order of loading."""
        for implementation in tuple(self._implementations):
            try:
                with Step(f"call {name} of {implementation.plugin_name!r}"):
                    implementation.function(*(arguments[argument] for argument in implementation.argnames))
            except Exception:
                self._failed(name, implementation)

    def _failed(self, name: str, implementation: pluggy.HookImpl) -> None:
        plugin = implementation.plugin_name
        self._failures[plugin] = self._failures.get(plugin, 0) + 1
        label, muted = self._labels.get(plugin, plugin), ""
        if self._failures[plugin] == MAX_FAILURES:
            self._implementations.remove(implementation)
            muted = f"; it is muted from now on, leave it out with -p no:{plugin}"
        logger.warning("%s: hook %s failed%s", label, name, muted, exc_info=True)
