"""Reads server-sent events from bytes as they come.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations


class SseReader:
    """Collects the `data` of events. Comments, and fields that OpenAI's API does not use, are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that the piece completes. Raises UnicodeDecodeError if they are no UTF-8."""
        # Not splitlines: JSON may hold other characters that end lines for Python.
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data).decode())
                self._data = []
        return found
