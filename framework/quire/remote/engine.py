"""The engine as its parent sees it: requests go to a child process, which may die without their being lost."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from quire.config import Configured
from quire.contract.kv import KVStats
from quire.contract.metrics import MetricsSink
from quire.contract.request import FinishReason
from quire.contract.scheduling import SchedulerStats
from quire.engine.build import build_front
from quire.engine.chat import ChatFormat
from quire.engine.engine import engine_info
from quire.engine.intake import Prompt, Submission
from quire.engine.metrics import Metrics
from quire.errors import EngineDead, RequestError
from quire.facade import EngineFacade, EngineView
from quire.outputs import OutputDelta
from quire.params import SamplingParams
from quire.registry import PluginHost
from quire.remote.child import Child
from quire.remote.ledger import LiveRequest
from quire.remote.messages import Abort, Accepted, Begin, Look, News, Refused, Reset, Seen, ToParent
from quire.remote.supervisor import Listeners, Supervisor
from quire.resolve import ResolvedConfig
from quire.tokenizer import Tokenizer

MAX_LOSSES = 2
"""Children that may die while a request lives; then it may be what kills them: it is tried alone, and ended by one
more loss."""

Post = Callable[[Callable[[], None]], None]


class RemoteEngine:
    """A `ServedEngine` whose steps run in a child process.

    Checking, tokenizing and rendering are done here; scheduling, the model and the text of outputs
    there. If the child dies or hangs, another is started and unfinished requests go on from their
    token logs.

    Raises:
        ConfigError: the engine cannot be built.
    """

    def __init__(self, configured: Configured, host: PluginHost) -> None:
        self._front = build_front(configured, host)
        self._begin = _begin(configured, host)
        self._child: Child | None = None
        self._adopt(Child.start(self._begin))
        self._live: dict[str, LiveRequest] = {}
        self._waiting: deque[LiveRequest] = deque()
        self._suspect: LiveRequest | None = None
        self._news: list[OutputDelta] = []
        self._looks: deque[Future[EngineView]] = deque()
        self._dead: str | None = None
        self._metrics = Metrics((), time.monotonic)
        self._supervisor: Supervisor | None = None

    @property
    def config(self) -> ResolvedConfig:
        """What runs."""
        return self._front.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._front.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """Renders conversations, and parses answers."""
        return self._front.chat

    @property
    def process_id(self) -> int | None:
        """Of the child; None while there is none."""
        return None if self._child is None else self._child.pid

    def attach(self, post: Post) -> None:
        """The front end is there: begin to listen to the child."""
        assert self._child is not None
        self._supervisor = Supervisor(
            self._child,
            lambda: Child.start(self._begin),
            self.config.config.step_timeout,
            Listeners(
                said=lambda message: post(lambda: self._said(message)),
                lost=lambda reason: post(self._lost),
                started=lambda child: post(lambda: self._started(child)),
                given_up=lambda reason: post(lambda: self._given_up(reason)),
            ),
        )

    def add_sink(self, name: str, sink: MetricsSink) -> None:
        """Feed one more metrics sink from now on."""
        self._metrics.add(name, sink)

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Submission:
        """Tokenize and check a request. Raises RequestError."""
        return self._front.intake.prepare(request_id, prompt, params, priority=priority, cache_salt=cache_salt)

    def add(self, submission: Submission) -> Future[None]:
        """Send a prepared request; the future raises RequestError if it can never run or its id is taken."""
        key = submission.request_id
        if key in self._live:
            raise RequestError(f"request id {key!r} is in use", param="request_id")
        live = self._live[key] = LiveRequest.begin(submission)
        self._waiting.append(live)
        self._send_waiting()
        return live.accepted

    def abort(self, request_id: str) -> list[OutputDelta]:
        """End a request. The child tells the final deltas; without one, they are told here."""
        live = self._live.get(request_id)
        if live is None:
            return []
        if self._child is None or live in self._waiting:
            return self._end(live, FinishReason.ABORT)
        self._child.send(Abort(request_id))
        return []

    def has_work(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._news) or self._dead is not None

    def step(self) -> list[OutputDelta]:
        """What the child has told since the last call. Raises EngineDead if there will be no child."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        news, self._news = self._news, []
        return news

    def fail(self, error: str) -> list[OutputDelta]:
        """End every live request with an error; their final deltas."""
        return [delta for live in list(self._live.values()) for delta in self._end(live, FinishReason.ERROR, error)]

    def info(self) -> EngineFacade:
        """What serves, and how much it can hold."""
        return self._info

    def health(self) -> str | None:
        """None if there is a child, else the reason why not; the supervisor ends one that hangs."""
        if self._dead is not None:
            return self._dead
        return None if self._child is not None else "the engine's process has ended; another one is being started"

    def kv_stats(self) -> KVStats:
        """The KV pool's snapshot, as last told."""
        return self._kv

    def scheduler_stats(self) -> SchedulerStats:
        """The queues' snapshot, as last told."""
        return self._queues

    def view(self) -> Future[EngineView]:
        """Ask the child. Raises EngineDead if there is none."""
        if self._child is None:
            raise EngineDead(self.health() or "the engine's process has ended")
        looked: Future[EngineView] = Future()
        self._looks.append(looked)
        self._child.send(Look())
        return looked

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Raises RuntimeError while requests run."""
        if self._live:
            raise RuntimeError("requests are running")
        if self._child is not None:
            self._child.send(Reset())

    def shutdown(self) -> None:
        """End the child; idempotent."""
        if self._supervisor is not None:
            self._supervisor.stop()
        elif self._child is not None:
            self._child.stop()
        self._metrics.close()

    # What the supervisor tells, in the engine's thread ------------------------------------------

    def _said(self, message: ToParent) -> None:
        if isinstance(message, News):
            self._take(message)
        elif isinstance(message, Seen):
            looked = self._looks.popleft()
            if looked.set_running_or_notify_cancel():
                looked.set_result(message.view)
        elif isinstance(message, Accepted):
            for request_id in message.request_ids:
                if request_id in self._live:
                    self._live[request_id].settle()
        elif isinstance(message, Refused):
            live = self._live.get(message.request_id)
            error = RequestError(message.message, param=message.param, remedy=message.remedy)
            if live is not None and live.settle(error):
                del self._live[message.request_id]
                self._acquit(live)
            elif live is not None:
                self._news += self._end(live, FinishReason.ERROR, message.message)

    def _take(self, news: News) -> None:
        self._kv, self._queues = news.kv, news.queues
        for stats in news.steps:
            self._metrics.step(stats)
        for request in news.requests:
            self._metrics.request(request)
        for delta in news.deltas:
            live = self._live.get(delta.request_id)
            if live is not None:
                self._news.append(live.told(delta))
                self._acquit(live)
                if delta.finished:
                    del self._live[delta.request_id]

    def _lost(self) -> None:
        self._child = None
        while self._looks:
            looked = self._looks.popleft()
            if looked.set_running_or_notify_cancel():
                looked.set_exception(EngineDead("the engine's process has ended"))
        suspects = list(self._live.values()) if self._suspect is None else [self._suspect]
        self._suspect = None
        for live in self._live.values():
            live.rewind()
        for live in suspects:
            live.num_losses += 1
            if live.num_losses > MAX_LOSSES:
                reason = f"the engine's process ended {live.num_losses} times while this request ran"
                self._news += self._end(live, FinishReason.ERROR, reason)

    def _started(self, child: Child) -> None:
        self._adopt(child)
        self._waiting = deque(sorted(self._live.values(), key=lambda live: live.num_losses < MAX_LOSSES))
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Send what waits, a suspect alone: until something is heard of it, a loss is its doing and no other's."""
        while self._waiting and self._suspect is None and self._child is not None:
            live = self._waiting.popleft()
            self._child.send(live.message())
            if live.num_losses >= MAX_LOSSES:
                self._suspect = live

    def _acquit(self, live: LiveRequest) -> None:
        """A request has come through a step, or has ended; if others wait for that, they go on."""
        if live is self._suspect:
            self._suspect = None
            self._send_waiting()

    def _adopt(self, child: Child) -> None:
        self._child = child
        self._kv, self._queues = child.ready.kv, child.ready.queues
        self._info = engine_info(self.config, child.ready.num_kv_blocks)

    def _given_up(self, reason: str) -> None:
        self._dead = reason

    def _end(self, live: LiveRequest, reason: FinishReason, error: str | None = None) -> list[OutputDelta]:
        del self._live[live.submission.request_id]
        if live in self._waiting:
            self._waiting.remove(live)
        self._acquit(live)
        live.settle(EngineDead(error) if error is not None else None)
        return live.end(reason, error)


def _begin(configured: Configured, host: PluginHost) -> Begin:
    said = configured.config.model_dump(mode="json", include=set(configured.origins))
    options = host.options
    return Begin(
        config={**said, "process": False},
        origins=dict(configured.origins),
        sections={name: dict(values) for name, values in configured.sections.items()},
        blocked=sorted(options.blocked),
        allowed=None if options.allowed is None else sorted(options.allowed),
        files=[str(path.absolute()) for path in options.files],
        log_level=logging.getLogger("quire").getEffectiveLevel(),
    )
