"""The waiting requests: preempted ones first, then by the policy's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from quire.contract.request import Request
from quire.contract.scheduling import RequestView, SchedulerPolicy


def view_of(request: Request) -> RequestView:
    """What a policy may know of a request."""
    return RequestView(
        request_id=request.request_id,
        arrival_time=request.arrival_time,
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_computed_tokens=request.num_computed_tokens,
        max_tokens=request.max_tokens,
        num_preemptions=request.num_preemptions,
    )


class WaitingQueue:
    """Requests without blocks, in the order in which they want to start.

    A preempted request stands before all others: it has been admitted once, and letting newcomers
    pass it would let it starve.
    """

    def __init__(self, policy: SchedulerPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def push(self, request: Request) -> None:
        """Let a request wait."""
        self._requests[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """It starts, or has ended."""
        del self._requests[request_id]

    def ordered(self) -> Iterator[Request]:
        """The requests, next one first; a snapshot, so the queue may change meanwhile."""
        now = self._clock()

        def order(request: Request) -> tuple[bool, tuple[float, ...], float]:
            return (request.num_preemptions == 0, self._policy.key(view_of(request), now), request.arrival_time)

        return iter(sorted(self._requests.values(), key=order))
