"""After a failed step: which of its rows is to blame? The others must not suffer for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from quire.contract.request import RowResult, ScheduledRow

logger = logging.getLogger(__name__)

MAX_CULPRITS = 4
"""Rows found to fail alone, after which parts that fail are not split any more: the step itself is broken."""


def isolate(
    rows: Sequence[ScheduledRow],
    error: Exception,
    run: Callable[[Sequence[ScheduledRow]], tuple[RowResult, ...]],
    blame: Callable[[Exception], str] = lambda error: "",
) -> tuple[RowResult, ...]:
    """Run the halves of a step that failed, and the halves of those that fail, down to single rows.

    A row that fails alone gets its error as its result; with k culprits among n rows this takes at
    most about 2 k log2(n) runs. Running a row again writes the same keys and values to the same slots.

    Args:
        rows: of the step, two at least. error: what it failed with. run: executes some of the rows.
        blame: names the plugin that an error comes from, as `PluginHost.blame`.

    Raises:
        Exception: `error`, if no row succeeds.
    """
    search = _Search(run, blame)
    results = search.halves(rows)
    if all(result.error is not None for result in results):
        raise error
    culprits = [result.request_id for result in results if result.error is not None]
    logger.error("a step of %d rows failed; ended %s", len(rows), ", ".join(culprits) or "nobody", exc_info=error)
    return results


class _Search:
    def __init__(
        self, run: Callable[[Sequence[ScheduledRow]], tuple[RowResult, ...]], blame: Callable[[Exception], str]
    ) -> None:
        self._run, self._blame = run, blame
        self._num_culprits = 0

    def halves(self, rows: Sequence[ScheduledRow]) -> tuple[RowResult, ...]:
        middle = len(rows) // 2
        return (*self._part(rows[:middle]), *self._part(rows[middle:]))

    def _part(self, rows: Sequence[ScheduledRow]) -> tuple[RowResult, ...]:
        try:
            return self._run(rows)
        except Exception as error:
            if len(rows) > 1 and self._num_culprits < MAX_CULPRITS:
                return self.halves(rows)
            self._num_culprits += len(rows)
            text = f"the step failed{self._blame(error)}: {type(error).__name__}: {error}"
            return tuple(RowResult(row.request_id, error=text) for row in rows)
