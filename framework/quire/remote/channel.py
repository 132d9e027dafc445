"""Whole messages over a local socket: four bytes of length, then msgpack. Nothing is pickled."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from quire.errors import EngineError

LENGTH = struct.Struct("!I")
MAX_FRAME = 256 << 20
"""Bytes of the largest message; a longer one is no message of ours."""

T = TypeVar("T")


class ChannelClosed(EngineError):
    """The other side is gone, or sent what is no message."""


class Channel(Generic[T]):
    """One end of a connection. Any thread may send, one may receive.

    Args:
        connection: a connected stream socket.
        kind: type of the messages that arrive, a union of `Message` types.
    """

    def __init__(self, connection: socket.socket, kind: Any) -> None:
        self._socket = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message. Raises ChannelClosed."""
        data = self._encoder.encode(message)
        try:
            with self._lock:
                self._socket.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(f"the connection is closed: {error.strerror or error}") from error

    def receive(self, timeout: float | None = None) -> T:
        """The next message.

        Raises:
            ChannelClosed: there will be none. TimeoutError: none began, or went on, for `timeout` seconds.
        """
        self._socket.settimeout(timeout)
        try:
            (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
            if length > MAX_FRAME:
                raise ChannelClosed(f"a message of {length} bytes is announced; {MAX_FRAME} are allowed")
            return self._decoder.decode(self._exactly(length))
        except msgspec.MsgspecError as error:
            raise ChannelClosed(f"what arrived is no message: {error}") from error
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(f"the connection is closed: {error.strerror or error}") from error

    def close(self) -> None:
        """Close this end; idempotent."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise ChannelClosed("the other side has closed the connection")
            data += piece
        return bytes(data)
