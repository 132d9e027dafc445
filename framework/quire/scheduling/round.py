"""One schedule in the making: rows, copies and grants are collected here while the scheduler decides."""

from __future__ import annotations

from collections.abc import Iterable

from quire.contract.kv import Allocation, BlockCopy
from quire.contract.request import NewRow, Request, Schedule, ScheduledRow


class Round:
    """One schedule in the making."""

    def __init__(self, step_id: int, released: tuple[int, ...]) -> None:
        self.budget = 0
        self.rows: dict[str, ScheduledRow] = {}
        self.preempted: list[str] = []
        self._step_id = step_id
        self._released = list(released)
        self._new_rows: list[NewRow] = []
        self._copies: list[BlockCopy] = []
        self._granted: dict[str, tuple[int, ...]] = {}

    def enter(self, request: Request) -> None:
        """The request takes its slot."""
        self._new_rows.append(
            NewRow(
                slot=request.slot,
                request_id=request.request_id,
                token_ids=request.token_ids[:],
                num_prompt_tokens=request.num_prompt_tokens,
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def grant(self, request: Request, allocation: Allocation) -> None:
        """Blocks that the executor must learn of with the request's row."""
        if allocation.block_ids:
            self._granted[request.request_id] = allocation.block_ids
            self._copies.extend(allocation.copies)

    def add_row(self, request: Request, first: int, count: int, samples: bool) -> None:
        """The request computes `count` tokens from position `first`."""
        self.budget -= count
        blocks = self._granted.get(request.request_id, ())
        self.rows[request.request_id] = ScheduledRow(request.slot, request.request_id, first, count, blocks, samples)

    def finish(self) -> Schedule:
        rows = decodes_first(self.rows.values())
        return Schedule(
            step_id=self._step_id,
            released=tuple(self._released),
            new_rows=tuple(self._new_rows),
            rows=rows,
            copies=tuple(self._copies),
            num_tokens=sum(row.num_new_tokens for row in rows),
            preempted=tuple(self.preempted),
        )


def decodes_first(rows: Iterable[ScheduledRow]) -> tuple[ScheduledRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.num_new_tokens > 1))
