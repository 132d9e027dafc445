"""The two policies that ship: first come first served, and priority with ageing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from quire.contract.scheduling import PolicyInit, RequestView, SchedulerPolicy


class FcfsPolicy(SchedulerPolicy):
    """The earliest arrival runs first; the latest is preempted first."""

    def key(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.arrival_time,)


class PriorityOptions(BaseModel):
    """Options of the `priority` policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds_per_level: float = Field(default=30.0, gt=0.0)
    """A request that has waited this long counts as one priority level better, so that none waits for ever."""


class PriorityPolicy(SchedulerPolicy):
    """The lowest priority value runs first; waiting improves it, which bounds every wait."""

    def __init__(self, init: PolicyInit) -> None:
        super().__init__(init)
        options = init.options or PriorityOptions()
        self._seconds_per_level: float = options.seconds_per_level

    def key(self, request: RequestView, now: float) -> tuple[float, ...]:
        waited = now - request.arrival_time
        return (request.priority - waited / self._seconds_per_level, request.arrival_time)
