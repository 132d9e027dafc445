"""One child process, as its parent holds it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

from quire import errors
from quire.config import child_environment
from quire.errors import EngineError, QuireError
from quire.remote.channel import Channel, ChannelClosed
from quire.remote.messages import Beat, Begin, Failed, Ready, Stop, ToChild, ToParent

STOP_TIMEOUT = 5.0
"""Seconds that a child has to exit when it is told to."""


class Child:
    """A running child. `start` and `receive` may block; the other methods do not wait for it.

    Attributes:
        ready: what it said when its engine stood.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel[ToParent], ready: Ready) -> None:
        self._process, self._channel = process, channel
        self.ready = ready

    @classmethod
    def start(cls, begin: Begin) -> Child:
        """Start a process and wait until its engine can serve.

        Raises:
            ConfigError: the engine cannot be built, as if it had been tried here.
            EngineError: the process ended without saying why.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: what lies in the working directory must not stand in for a package.
            command = [sys.executable, "-P", "-m", "quire.remote.worker", str(theirs.fileno())]
            process = subprocess.Popen(
                command, env=child_environment(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        channel: Channel[ToParent] = Channel(ours, ToParent)
        try:
            channel.send(begin)
            return cls(process, channel, _until_ready(process, channel))
        except BaseException:
            process.kill()
            process.wait()
            channel.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToChild) -> None:
        """Tell the child; a child that is gone is not told, which whoever receives from it will find out."""
        try:
            self._channel.send(message)
        except ChannelClosed:
            return

    def receive(self, timeout: float) -> ToParent:
        """What the child says next. Raises ChannelClosed, or TimeoutError after that many silent seconds."""
        return self._channel.receive(timeout)

    def kill(self) -> str:
        """End the process at once; how it had ended, if it had."""
        self._process.kill()
        return self._buried(self._process.wait())

    def exit_manner(self) -> str:
        """How a process that has closed its connection ended."""
        try:
            return self._buried(self._process.wait(STOP_TIMEOUT))
        except subprocess.TimeoutExpired:
            return self.kill()

    def _buried(self, code: int) -> str:
        self._channel.close()
        return _manner(code)

    def stop(self) -> None:
        """Ask the process to exit, and end it if it does not."""
        self.send(Stop())
        self.exit_manner()


def _until_ready(process: subprocess.Popen[bytes], channel: Channel[ToParent]) -> Ready:
    while True:
        try:
            message = channel.receive()
        except ChannelClosed:
            reason = f"the engine's process {_manner(process.wait())} before it was ready"
            raise EngineError(reason, remedy="its messages above say why; engine.process: false shows more") from None
        if isinstance(message, Ready):
            return message
        if isinstance(message, Failed):
            raise _as_error(message)
        if not isinstance(message, Beat):
            raise EngineError(f"the engine's process sent {type(message).__name__} before it was ready")


def _as_error(failed: Failed) -> QuireError:
    kind = getattr(errors, failed.kind, None)
    known = isinstance(kind, type) and issubclass(kind, QuireError)
    return (kind if known else EngineError)(failed.message, remedy=failed.remedy)  # type: ignore[misc]


def _manner(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
