"""`AsyncLLM`: the engine in a thread of its own, for servers.

A request is checked in the caller's stack, so a bad one fails before anything runs. Accepted ones
go to the thread through an inbox; each step's deltas cross to the event loop in one hop. If the
loop dies, every waiting stream gets its final delta with finish reason `error`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from quire.config import EngineConfig
from quire.contract.metrics import MetricsSink
from quire.delivery import Reader, Stream, Take, hand_over
from quire.engine.build import configured_by, host_for
from quire.engine.chat import ChatFormat
from quire.engine.intake import Prompt, Submission
from quire.engine.served import ServedEngine
from quire.errors import EngineDead, RequestError
from quire.facade import EngineFacade, EngineView
from quire.outputs import OutputDelta
from quire.params import SamplingParams, sampling_defaults
from quire.registry import PluginHost
from quire.remote.start import served_engine
from quire.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncLLM:
    """A model that serves many callers at once. Arguments as for `LLM`."""

    def __init__(
        self,
        model: str | None = None,
        *,
        host: PluginHost | None = None,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        configured = configured_by(model, options, config)
        self._begin(served_engine(configured, host or host_for(configured.config)))

    @classmethod
    def over(cls, engine: ServedEngine, sinks: Sequence[tuple[str, MetricsSink]] = ()) -> Self:
        """Serve an engine that has been built; `sinks`: further metrics sinks, with their names."""
        served = cls.__new__(cls)
        for name, sink in sinks:
            engine.add_sink(name, sink)
        served._begin(engine)
        return served

    def _begin(self, engine: ServedEngine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._dead: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="quire-engine", daemon=True)
        engine.attach(self._inbox.put)
        self._thread.start()

    @property
    def engine(self) -> ServedEngine:
        """The engine; ask it nothing that changes it, that is the thread's right."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """Renders conversations, and parses answers."""
        return self._engine.chat

    @property
    def info(self) -> EngineFacade:
        """What serves, and how much it can hold."""
        return self._engine.info()

    @property
    def cause_of_death(self) -> str | None:
        """Why the engine can serve no more; None while it can, or after an orderly shutdown."""
        return None if self._dead is None else f"the engine has ended: {self._dead}"

    def resolved_config(self) -> dict[str, Any]:
        """Every field of the configuration, decided; secrets are masked."""
        return self._engine.config.to_dict()

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` as the checkpoint asks for them where a request says nothing."""
        return sampling_defaults(self._engine.config.checkpoint.generation_config)

    def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Submission:
        """Check a request without submitting it. Raises RequestError, or EngineDead."""
        self._check_alive()
        return self._engine.prepare(
            request_id or uuid.uuid4().hex,
            prompt,
            sampling_params or SamplingParams(),
            priority=priority,
            cache_salt=cache_salt,
        )

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[OutputDelta]:
        """Yield a request's deltas; exactly one has `finished` set, and it is the last.

        Cancelling the task, or leaving the loop, aborts the request within one step.

        Raises:
            RequestError: the request cannot be honoured. EngineDead: the engine has ended.
        """
        submission = self.prepare(
            prompt, sampling_params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        async for delta in self.submit(submission):
            yield delta

    async def submit(self, submission: Submission) -> AsyncGenerator[OutputDelta]:
        """As `stream`, for a request that `prepare` returned."""
        reader = Reader()
        with self._open(submission, reader.put) as ended:
            ended.add_done_callback(reader.wake)
            while True:
                delta = await reader.get(ended)
                yield delta
                if delta.finished:
                    return

    async def run(self, submission: Submission, take: Take) -> None:
        """Run a request that `prepare` returned: call `take` with each delta, in the event loop; done after the last.

        For many streams at once: no task has to wake for a delta. Cancelling it aborts the request within one step;
        so does what `take` raises, which comes out here.

        Raises:
            RequestError: the request cannot be honoured. EngineDead: the engine has ended.
        """
        with self._open(submission, take) as ended:
            await ended

    @contextmanager
    def _open(self, submission: Submission, take: Take) -> Iterator[asyncio.Future[None]]:
        """Submit a request; a future that is done with the last delta. What still runs when it is left is aborted."""
        self._check_alive()
        key = submission.request_id
        if key in self._streams:
            raise RequestError(f"request id {key!r} is in use", param="request_id")
        stream = self._streams[key] = Stream(asyncio.get_running_loop(), take)
        self._post(lambda: self._add(submission, stream))
        try:
            yield stream.ended
        finally:
            del self._streams[key]
            if stream.close():
                self._call(lambda: self._engine.abort(key))

    def _add(self, submission: Submission, stream: Stream) -> None:
        """In the engine's thread: hand the request over; a refusal is the stream's end."""

        def refuse(error: BaseException) -> None:
            if not stream.loop.is_closed():
                stream.loop.call_soon_threadsafe(stream.refuse, error)

        def answered(answer: Future[None]) -> None:
            if (error := answer.exception()) is not None:
                refuse(error)

        try:
            self._check_alive()
            answer = self._engine.add(submission)
        except Exception as error:
            refuse(error)
        else:
            if answer is not None:
                answer.add_done_callback(answered)

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a final delta with finish reason `abort`."""
        await self._run(lambda: self._deliver(self._engine.abort(request_id)))

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Raises RuntimeError while requests run."""
        await self._run(self._engine.reset_prefix_cache)

    async def view(self) -> EngineView:
        """What the engine is doing, between two steps. Raises EngineDead."""
        answer = await self._run(self._engine.view)
        return await asyncio.wrap_future(answer) if isinstance(answer, Future) else answer

    async def check_health(self, timeout: float = 10.0) -> None:
        """Ask the loop itself. Raises EngineDead if it has ended or does not answer in `timeout` seconds."""
        try:
            reason = await asyncio.wait_for(self._run(self._engine.health), timeout)
        except TimeoutError as error:
            raise EngineDead(f"the engine's loop did not answer within {timeout:g} s") from error
        if reason is not None:
            raise EngineDead(reason)

    def shutdown(self, timeout: float = 10.0) -> None:
        """Abort what runs, end the thread, let the model go; idempotent."""
        if self._thread.is_alive():
            self._inbox.put(self._stop)
            self._thread.join(timeout)
        self._engine.shutdown()

    def _check_alive(self) -> None:
        if (cause := self.cause_of_death) is not None:
            raise EngineDead(cause)
        if self._stopping:
            raise EngineDead("the engine has been shut down")

    def _call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the engine's thread, between two steps; EngineDead if the loop ends before that."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._check_alive()
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._post(run)
        return future

    def _post(self, work: Callable[[], object]) -> None:
        self._inbox.put(work)
        if self._dead is not None or self._stopping:
            self._drain()  # the thread may have ended after the check: nobody else would answer

    async def _run(self, work: Callable[[], T]) -> T:
        self._check_alive()
        return await asyncio.wrap_future(self._call(work))

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox(wait=not self._engine.has_work())
                if self._engine.has_work():
                    self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine's loop has ended")
            self._dead = error
        self._deliver(self._engine.fail(f"the engine has ended: {self._dead or 'shut down'}"))
        self._drain()

    def _take_inbox(self, wait: bool) -> None:
        try:
            if wait:
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _drain(self) -> None:
        """Refuse whatever still stands in the inbox of an ended loop."""
        self._take_inbox(wait=False)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        """One hop per event loop, however many deltas a step made."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, OutputDelta]]] = defaultdict(list)
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                batches[stream.loop].append((stream, delta))
        for loop, batch in batches.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(hand_over, batch)
