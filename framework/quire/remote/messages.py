"""What parent and child tell each other: typed msgpack, checked against these definitions on arrival."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from quire.contract.kv import KVStats
from quire.contract.metrics import RequestStats, StepStats
from quire.contract.request import Request
from quire.contract.scheduling import SchedulerStats
from quire.engine.intake import Submission
from quire.facade import EngineView
from quire.outputs import OutputDelta
from quire.params import SamplingParams


class Message(Struct, tag=True):
    """One message; its type's name travels along."""


# To the child ------------------------------------------------------------------------------------


class Begin(Message):
    """Build the engine: names and options, which the child resolves again.

    Attributes:
        config: fields of `EngineConfig`. origins: field -> source. sections: those that plugins own.
        blocked, allowed, files: which plugins to load, as in `HostOptions`.
        log_level: of the logger `quire`.
    """

    config: dict[str, Any]
    origins: dict[str, str]
    sections: dict[str, dict[str, Any]]
    blocked: list[str]
    allowed: list[str] | None
    files: list[str]
    log_level: int


class WireSequence(Struct, frozen=True):
    """One sequence of a request; `output_token_ids` are those that it had before the child was started."""

    request_id: str
    max_tokens: int
    seed: int
    fork_of: str | None
    output_token_ids: list[int]


class Add(Message):
    """Take a request; answered by `Accepted` or `Refused`."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    arrival_time: float
    stop_token_ids: list[int]
    priority: int
    cache_salt: str
    sequences: list[WireSequence]

    def submission(self) -> Submission:
        """As the engine takes it. Raises RequestError for parameters that no sender of ours would send."""
        params = SamplingParams(**self.params)
        prompt = tuple(self.prompt_token_ids)
        stops = frozenset(self.stop_token_ids)
        sequences = tuple(
            Request(
                request_id=sequence.request_id,
                prompt_token_ids=prompt,
                params=params,
                arrival_time=self.arrival_time,
                max_tokens=sequence.max_tokens,
                stop_token_ids=stops,
                seed=sequence.seed,
                priority=self.priority,
                cache_salt=self.cache_salt,
                fork_of=sequence.fork_of,
                output_token_ids=list(sequence.output_token_ids),
            )
            for sequence in self.sequences
        )
        return Submission(self.request_id, None, prompt, params, sequences)


class Abort(Message):
    """End a request; its final deltas come as news."""

    request_id: str


class Reset(Message):
    """Forget cached prefixes; sent only while no request lives."""


class Look(Message):
    """Tell what the engine is doing; answered by `Seen`."""


class Stop(Message):
    """Let everything go and exit."""


# To the parent -----------------------------------------------------------------------------------


class Ready(Message):
    """The engine can serve."""

    num_kv_blocks: int
    kv: KVStats
    queues: SchedulerStats


class Failed(Message):
    """The engine could not be built: name of a class of `quire.errors`, and what it says."""

    kind: str
    message: str
    remedy: str


class Accepted(Message):
    """The requests will run; told of all that came together, for each message wakes two threads."""

    request_ids: list[str]


class Refused(Message):
    """The request can never run."""

    request_id: str
    message: str
    param: str | None
    remedy: str


class News(Message):
    """What has happened since the last one."""

    kv: KVStats
    queues: SchedulerStats
    deltas: list[OutputDelta] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)
    requests: list[RequestStats] = field(default_factory=list)


class Seen(Message):
    """The answer to the oldest `Look` that has none."""

    view: EngineView


class Beat(Message):
    """Sign of life, once a second.

    Attributes:
        busy_s: how long the present step has taken, or 0.0 between two steps.
    """

    busy_s: float


ToChild = Begin | Add | Abort | Reset | Look | Stop
ToParent = Ready | Failed | Accepted | Refused | News | Seen | Beat
