"""Scheduling: who runs in a step, and with how many tokens. No tensors, no model, no clock of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.contract.kv import KVAllocator
from quire.contract.request import FinishReason, Request, Schedule, StepResult, TokenLogprobs
from quire.params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request. Times are seconds of the engine's clock."""

    request_id: str
    arrival_time: float
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    max_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """What a policy may know of the engine.

    Attributes:
        now: the engine's clock, in seconds.
        num_running: requests that own blocks.
        num_waiting: requests that do not.
        free_blocks: blocks that can be granted.
        total_blocks: blocks in the pool.
        max_num_seqs: most requests that may run at once.
        max_num_batched_tokens: most tokens of one step.
    """

    now: float
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class PolicyInit:
    """All that a policy is constructed from; `options` is the validated instance of `Provider.options`."""

    options: Any = None


class SchedulerPolicy(ABC):
    """The decisions of the default scheduler that people differ on. It may keep no references."""

    def __init__(self, init: PolicyInit) -> None:
        self.init = init

    @abstractmethod
    def key(self, request: RequestView, now: float) -> tuple[float, ...]:
        """The waiting order: the smallest key runs first. Ties go to the earlier arrival."""

    def admit(self, request: RequestView, view: SchedulerView) -> bool:
        """Whether the request at the head of the queue may start now. Not asked when nothing runs."""
        return True

    def pick_victim(self, running: Sequence[RequestView], view: SchedulerView) -> str:
        """Id of the running request to preempt when blocks run out. `running` holds only those that may be taken."""
        return max(running, key=lambda request: (self.key(request, view.now), request.arrival_time)).request_id

    def token_budget(self, view: SchedulerView) -> int:
        """Tokens of the next step, clipped to 1 .. max_num_batched_tokens."""
        return view.max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class SchedulerInit:
    """All that a scheduler is constructed from.

    Attributes:
        allocator: the KV pool; the scheduler alone calls it.
        policy: the decisions that are pluggable.
        max_num_seqs: most requests that may run at once, and the number of slots.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: most tokens of one request, prompt and output.
        clock: seconds, monotonic.
        options: the validated instance of `Provider.options`, or None.
        needs_host_tokens: whether a request with these parameters may be scheduled only when the ids of all its
            tokens are known to the host (`LogitsProcessor.needs_host_tokens`); it skips the steps between.
    """

    allocator: KVAllocator
    policy: SchedulerPolicy
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    clock: Callable[[], float]
    options: Any = None
    needs_host_tokens: Callable[[SamplingParams], bool] = lambda params: False


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """What a step meant for one request.

    Attributes:
        request: the request, already updated; finished if `finish_reason` is set.
        new_token_ids: tokens appended by this update.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: entries for prompt positions computed by this step, if asked for.
        error: why the request failed, for finish reason `error`.
    """

    request: Request
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot: requests waiting and running, preemptions and finished requests since the start."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    num_finished: int


class Scheduler(ABC):
    """Decides each step. Called from the engine's thread only.

    `schedule` may be called again before `update` of the step before: it counts on that step's
    tokens (`Request.num_pending_tokens`). Blocks and slots of a request that ends are given up only
    when no scheduled step that names it is outstanding.
    """

    def __init__(self, init: SchedulerInit) -> None:
        self.init = init

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never fit into the pool."""

    @abstractmethod
    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a request at once, from outside (abort, stop string). None if it is unknown or has ended."""

    @abstractmethod
    def schedule(self) -> Schedule:
        """Choose the next step's rows and grant their blocks. Empty if there is nothing to run."""

    @abstractmethod
    def update(self, schedule: Schedule, result: StepResult) -> list[RequestUpdate]:
        """Take a step's result: append tokens, apply stop conditions, publish and free blocks."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether any request has not ended, or released slots are still to be told to the executor."""

    @abstractmethod
    def stats(self) -> SchedulerStats:
        """A snapshot of the queues."""
