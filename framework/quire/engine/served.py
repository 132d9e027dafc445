"""What a front end needs of an engine, whether it runs in this process or in a child of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from quire.contract.kv import KVStats
from quire.contract.metrics import MetricsSink
from quire.contract.scheduling import SchedulerStats
from quire.engine.chat import ChatFormat
from quire.engine.intake import Prompt, Submission
from quire.facade import EngineFacade, EngineView
from quire.outputs import OutputDelta
from quire.params import SamplingParams
from quire.resolve import ResolvedConfig
from quire.tokenizer import Tokenizer


class ServedEngine(Protocol):
    """An engine. `prepare` and the properties are safe from any thread, everything else belongs to one."""

    @property
    def config(self) -> ResolvedConfig:
        """What runs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def chat(self) -> ChatFormat:
        """Renders conversations, and parses answers."""

    def attach(self, post: Callable[[Callable[[], None]], None]) -> None:
        """The front end is there: `post` runs work in the engine's thread, between two steps."""

    def add_sink(self, name: str, sink: MetricsSink) -> None:
        """Feed one more metrics sink from now on."""

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Submission:
        """Tokenize and check a request. Raises RequestError."""

    def add(self, submission: Submission) -> Future[None] | None:
        """Accept a prepared request. Raises RequestError; if the answer comes later, the future does."""

    def abort(self, request_id: str) -> list[OutputDelta]:
        """End a request; its final deltas. Unknown or ended requests are a no-op."""

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def step(self) -> list[OutputDelta]:
        """What has come since the last call. Raises EngineDead if the engine cannot go on."""

    def fail(self, error: str) -> list[OutputDelta]:
        """End every live request with an error; their final deltas."""

    def info(self) -> EngineFacade:
        """What serves, and how much it can hold."""

    def health(self) -> str | None:
        """None if requests are being served, else the reason why not."""

    def kv_stats(self) -> KVStats:
        """The KV pool's snapshot."""

    def scheduler_stats(self) -> SchedulerStats:
        """The queues' snapshot."""

    def view(self) -> EngineView | Future[EngineView]:
        """Who holds which blocks, and how much there is to do. Raises EngineDead."""

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Raises RuntimeError while requests run."""

    def shutdown(self) -> None:
        """Let everything go; idempotent."""
