"""The child process: builds an engine as it is told, then runs it until it is told to stop.

It exits when its parent is gone, however that ended.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from quire.config import Configured, make_config
from quire.contract.metrics import MetricsInit, MetricsSink, RequestStats, StepStats
from quire.engine.build import engine_from
from quire.engine.engine import Engine
from quire.errors import QuireError, RequestError
from quire.garbage import spare_what_stays
from quire.outputs import OutputDelta
from quire.registry import HostOptions, build_host
from quire.remote.channel import Channel, ChannelClosed
from quire.remote.messages import (
    Abort,
    Accepted,
    Add,
    Beat,
    Begin,
    Failed,
    Look,
    News,
    Ready,
    Refused,
    Reset,
    Seen,
    Stop,
    ToChild,
)

BEAT_INTERVAL = 1.0
"""Seconds between two signs of life."""


def main(descriptor: int) -> int:
    """Serve the parent at the other end of an inherited socket; the process's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent decides what follows
    channel: Channel[ToChild] = Channel(socket.socket(fileno=descriptor), ToChild)
    begin = channel.receive()
    if not isinstance(begin, Begin):
        raise ChannelClosed(f"the first message is {type(begin).__name__}; it must be Begin")
    logging.basicConfig(format="engine: %(levelname)s %(name)s: %(message)s")
    logging.getLogger("quire").setLevel(begin.log_level)
    worker = Worker(channel)
    try:
        engine = build(begin)
    except QuireError as error:
        channel.send(Failed(type(error).__name__, error.message, error.remedy))
        return error.exit_code
    spare_what_stays()
    worker.serve(engine)
    return 0


def build(begin: Begin) -> Engine:
    """The engine of a `Begin`. Raises QuireError."""
    allowed = None if begin.allowed is None else frozenset(begin.allowed)
    files = tuple(Path(file) for file in begin.files)
    host = build_host(HostOptions(frozenset(begin.blocked), allowed, files=files))
    return engine_from(Configured(make_config(begin.config), begin.origins, begin.sections), host)


class Worker:
    """The child's two helpers, which listen and beat, and the engine's loop. Listens from the start."""

    def __init__(self, channel: Channel[ToChild]) -> None:
        self._channel = channel
        self._inbox: queue.SimpleQueue[ToChild] = queue.SimpleQueue()
        self._step_began: float | None = None
        self._told_to_stop = False
        self._accepted: list[str] = []
        for name, work in (("listen", self._listen), ("beat", self._beat)):
            threading.Thread(target=work, name=f"quire-{name}", daemon=True).start()

    def serve(self, engine: Engine) -> None:
        """Run the engine until `Stop` comes. Raises EngineDead if it cannot go on."""
        sink = _Collected(MetricsInit(engine.config.checkpoint.name))
        engine.add_sink("wire", sink)
        self._channel.send(Ready(engine.parts.num_kv_blocks, engine.kv_stats(), engine.scheduler_stats()))
        while not self._told_to_stop:
            deltas = self._take_inbox(engine)
            if engine.has_work():
                self._step_began = time.monotonic()
                deltas += engine.step()
                self._step_began = None
            steps, requests = sink.take()
            if deltas or steps or requests:
                self._channel.send(News(engine.kv_stats(), engine.scheduler_stats(), deltas, steps, requests))
        engine.shutdown()

    def _take_inbox(self, engine: Engine) -> list[OutputDelta]:
        """Do what the parent asks; waits for it if there is nothing else to do."""
        deltas: list[OutputDelta] = []
        wait = not engine.has_work()
        while wait or not self._inbox.empty():
            deltas += self._handle(engine, self._inbox.get())
            wait = False
        if self._accepted:
            self._channel.send(Accepted(self._accepted))
            self._accepted = []
        return deltas

    def _handle(self, engine: Engine, message: ToChild) -> list[OutputDelta]:
        if isinstance(message, Add):
            self._add(engine, message)
        elif isinstance(message, Abort):
            return engine.abort(message.request_id)
        elif isinstance(message, Reset):
            engine.reset_prefix_cache()
        elif isinstance(message, Look):
            self._channel.send(Seen(engine.view()))
        elif isinstance(message, Stop):
            self._told_to_stop = True
        return []

    def _add(self, engine: Engine, message: Add) -> None:
        try:
            engine.add(message.submission())
        except RequestError as error:
            self._channel.send(Refused(message.request_id, error.message, error.param, error.remedy))
        else:
            self._accepted.append(message.request_id)

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._channel.receive())
        except ChannelClosed:
            os._exit(0)  # nobody is left to work for; the loop may be deep in a step

    def _beat(self) -> None:
        try:
            while True:
                began = self._step_began
                self._channel.send(Beat(0.0 if began is None else time.monotonic() - began))
                time.sleep(BEAT_INTERVAL)
        except ChannelClosed:
            return


class _Collected(MetricsSink):
    """Keeps statistics until the next message takes them along."""

    def __init__(self, init: MetricsInit) -> None:
        super().__init__(init)
        self._steps: list[StepStats] = []
        self._requests: list[RequestStats] = []

    def record_step(self, stats: StepStats) -> None:
        self._steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        self._requests.append(stats)

    def take(self) -> tuple[list[StepStats], list[RequestStats]]:
        """What has come since the last call."""
        taken = self._steps, self._requests
        self._steps, self._requests = [], []
        return taken


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
