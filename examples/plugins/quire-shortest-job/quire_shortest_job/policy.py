"""Shortest job first, which makes the mean wait short, with ageing, which bounds every wait.

A job's size is what it may still compute: its prompt and the most tokens that it may generate. Each second of
waiting makes a job count as `tokens_per_second` smaller, so a job of size s waits no longer for newcomers than
s / tokens_per_second seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from quire.plugin import PolicyInit, RequestView, SchedulerPolicy, SchedulerView


class ShortestJobOptions(BaseModel):
    """What stands under `plugins.options.shortest_job` in the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_second: float = Field(default=100.0, gt=0.0)
    """By how many tokens a job counts as smaller per second of waiting."""
    output_weight: float = Field(default=1.0, ge=0.0)
    """What a token to generate counts beside one of the prompt; 0 where requests set max_tokens at random."""


class ShortestJobPolicy(SchedulerPolicy):
    """See the module's docstring."""

    def __init__(self, init: PolicyInit) -> None:
        super().__init__(init)
        options = init.options or ShortestJobOptions()
        self._rate: float = options.tokens_per_second
        self._output_weight: float = options.output_weight

    def key(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (self._size(request) - self._rate * (now - request.arrival_time),)

    def pick_victim(self, running: Sequence[RequestView], view: SchedulerView) -> str:
        # Its computed tokens will be computed again: the one with the fewest loses least; of equals the largest job.
        victim = min(running, key=lambda request: (request.num_computed_tokens, -self._size(request)))
        return victim.request_id

    def _size(self, request: RequestView) -> float:
        to_generate = max(0, request.max_tokens - request.num_output_tokens)
        return request.num_prompt_tokens + self._output_weight * to_generate
