"""What the parts of the engine tell each other about requests: plain data, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import overload

from quire.contract.kv import BlockCopy
from quire.params import SamplingParams


class RequestStatus(Enum):
    """Where a request stands. Only the scheduler changes it."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended; every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenView(Sequence[int]):
    """Two sequences read as one, the second possibly still growing; slices copy only what they hold."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Sequence[int], second: Sequence[int]) -> None:
        self._first = first
        self._second = second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        border = len(self._first)
        if isinstance(index, int):
            index = range(len(self))[index]
            return self._first[index] if index < border else self._second[index - border]
        start, stop, step = index.indices(len(self))
        if step != 1:
            return tuple(self[at] for at in range(start, stop, step))
        late = self._second[max(0, start - border) : max(0, stop - border)]
        return (*self._first[start : min(stop, border)], *late)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to be generated. The scheduler alone changes it after it was added.

    A request lets `num_computed_tokens` catch up with `num_tokens`; prefill, decode and recompute
    after preemption are all that. `num_computed_tokens` counts what has been handed to the
    executor, so a step may be scheduled while the one before it still runs;
    `num_pending_tokens` counts tokens whose ids such a step has yet to deliver.

    Attributes:
        request_id: unique among live requests, made by the engine.
        prompt_token_ids: at least one token.
        params: the caller's sampling parameters.
        arrival_time: seconds, of the engine's clock.
        priority: lower runs earlier under the `priority` policy.
        cache_salt: requests with different salts share no KV.
        max_tokens: most output tokens, resolved from params and the model's length.
        stop_token_ids: tokens that end the output, resolved from params and the model.
        seed: resolved seed of the sampler's generator, 64 bits.
        fork_of: id of the request whose prompt this one shares (n > 1), or None.
        output_token_ids: tokens sampled so far.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission; -1 before it.
        slot: row of the runner's buffers while it runs, else -1.
        num_preemptions: how often it lost its blocks.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_time: float
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    cache_salt: str = ""
    fork_of: str | None = None
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int = -1
    slot: int = -1
    num_preemptions: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those still pending included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def token_ids(self) -> TokenView:
        """All known tokens, prompt first; nothing is copied."""
        return TokenView(self.prompt_token_ids, self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request that takes a slot: its first step, or its first after preemption.

    Attributes:
        slot: row of the runner's persistent buffers, free until now.
        request_id: the request.
        token_ids: all tokens known so far, prompt first.
        num_prompt_tokens: how many of them are the prompt.
        params: the sampling parameters.
        seed: the resolved seed.
        stop_token_ids: the resolved stop tokens.
    """

    slot: int
    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One row of a step.

    Attributes:
        slot: the row of the runner's buffers.
        request_id: the request.
        num_computed_tokens: tokens computed before this step; the first new token's position.
        num_new_tokens: tokens to compute in this step, at least 1.
        new_block_ids: blocks to append to the slot's block table before the step.
        samples: True if the step reaches the request's last token, so that a token is sampled.
    """

    slot: int
    request_id: str
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one step runs: the scheduler's answer, all that an executor needs.

    Attributes:
        step_id: counts up by one per schedule.
        released: slots given up since the last schedule; clear them before taking new rows.
        new_rows: requests that take a slot.
        rows: the step's rows, decodes first; empty if there is nothing to run.
        copies: block copies to execute before the step.
        num_tokens: sum of the rows' new tokens.
        preempted: ids of requests that lost their blocks to this schedule.
    """

    step_id: int
    released: tuple[int, ...] = ()
    new_rows: tuple[NewRow, ...] = ()
    rows: tuple[ScheduledRow, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    num_tokens: int = 0
    preempted: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.rows


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, before penalties, temperature and truncation.

    Attributes:
        token_id: the token that stands there.
        logprob: its natural log probability.
        rank: 1 for the most likely token.
        top_ids: the most likely tokens, best first.
        top_logprobs: their log probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step did for one row.

    Attributes:
        request_id: the request.
        token_id: the sampled token, or None for a row that samples nothing.
        logprobs: of the sampled token, if asked for.
        prompt_logprobs: of the prompt tokens that this step's hidden states predict, if asked for;
            the first belongs to prompt position `num_computed_tokens + 1`.
        error: why the row failed; its token is not to be used.
    """

    request_id: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """An executor's answer to one schedule; `rows` stand in the order of `Schedule.rows`.

    Attributes:
        step_id: the schedule's.
        rows: one result per scheduled row.
        build_s: seconds spent building the batch. forward_s: in the model. sample_s: in sampling. On a device
            that runs ahead of the host these are the host's own, and
        wait_s: seconds that it waited for the results.
    """

    step_id: int
    rows: tuple[RowResult, ...] = ()
    build_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    wait_s: float = 0.0
