"""Chat templates, rendered here or in processes that are killed when they take too long."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from quire.errors import EngineError
from quire.tokenizer import render_worker

MAX_MEMORY = 512 << 20
"""Bytes that a rendering may take."""
MAX_CHARACTERS = 16 << 20
"""Characters that it may write."""
MAX_PROCESSES = 2
"""Renderings that run at once; so one that hangs does not hold up all others."""
START_TIMEOUT = 60.0
"""Seconds for a process to load its packages."""


class RenderError(Exception):
    """A template wrote nothing; the message says why."""


class Renderer:
    """Renders chat templates. Safe to use from several threads.

    Args:
        timeout: seconds that a rendering may take, in a process of its own; None: here, without limits.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._idle: list[_Process] = []
        self._free = threading.Semaphore(MAX_PROCESSES)

    def render(self, job: Mapping[str, Any]) -> str:
        """The text; `job` as for `render_worker.render`. Raises RenderError."""
        if self._timeout is not None:
            return self._apart(job, self._timeout)
        try:
            return render_worker.render(job)
        except Exception as error:  # Jinja's errors, the template's own raise_exception, bad message shapes
            raise RenderError(str(error) or type(error).__name__) from error

    def _apart(self, job: Mapping[str, Any], timeout: float) -> str:
        try:
            line = json.dumps(job).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RenderError(f"messages and arguments must be JSON values: {error}") from error
        with self._free:
            # Two threads never hold the same process: pop and append are atomic.
            process = self._idle.pop() if self._idle else _Process(timeout)
            said = process.ask(line, timeout)
            self._idle.append(process)
        if "error" in said:
            raise RenderError(said["error"])
        return said["text"]


class _Process:
    """One process; ended when nobody holds it any more, at the latest with this one."""

    def __init__(self, timeout: float) -> None:
        limits = [str(timeout), str(MAX_MEMORY), str(MAX_CHARACTERS)]
        # -P: what lies beside the script, or in the working directory, must not stand in for a package.
        command = [sys.executable, "-P", render_worker.__file__, *limits]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._say(b"", START_TIMEOUT)
        except RenderError as error:
            raise EngineError(f"the process that renders chat templates does not start: {error}") from error

    def ask(self, line: bytes, timeout: float) -> dict[str, str]:
        """What it says to a job. Raises RenderError if it says nothing in time, or dies; it is ended then."""
        said: dict[str, str] = json.loads(self._say(line, timeout))
        return said

    def _say(self, line: bytes, timeout: float) -> bytes:
        """Send it a line, and return its next one."""
        process = self._process
        jobs, answers = process.stdin, process.stdout
        assert jobs is not None
        assert answers is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            jobs.write(line)
            jobs.flush()
            answer = answers.readline()
        except OSError:
            answer = b""
        finally:
            timer.cancel()
        if not answer.endswith(b"\n"):
            self._end()
            raise RenderError(f"it took longer than {timeout:g} seconds" if late.is_set() else "its process has died")
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # of a line that was not sent
                pipe.close()
