"""One person's connection to a running server: whole answers and streams, failures as errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from quire import EngineError, QuireError, RequestError

from quire_server.client.address import Address
from quire_server.client.sse_reader import SseReader

CONNECT, READ = 10.0, 600.0
"""Seconds until a connection stands, and of silence on it; a prompt may be long, and a queue too."""


class ServerUnreachable(EngineError):
    """Nobody answers there, or nobody who speaks OpenAI's API."""


def authorization(key: str | None) -> dict[str, str]:
    """The header that brings a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def async_client(address: Address, key: str | None, silence: float) -> httpx.AsyncClient:
    """A client for many requests at once, of which it holds none back.

    Args:
        address: of the server. key: to send with each request.
        silence: seconds without a byte after which a request is given up.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    uds = None if address.uds is None else httpx.AsyncHTTPTransport(uds=address.uds, limits=limits)
    timeout = httpx.Timeout(silence, connect=min(CONNECT, silence))
    return httpx.AsyncClient(
        base_url=address.base, headers=authorization(key), timeout=timeout, transport=uds, limits=limits
    )


class Connection:
    """Asks one server.

    Args:
        address: the server. key: to send with each request.
        transport: instead of a network, for tests.
    """

    def __init__(self, address: Address, key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        self.address = address
        if transport is None and address.uds is not None:
            transport = httpx.HTTPTransport(uds=address.uds)
        timeout = httpx.Timeout(READ, connect=CONNECT)
        headers = authorization(key)
        self._client = httpx.Client(base_url=address.base, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """Names of what is served. Raises ServerUnreachable, RequestError if the key is refused."""
        try:
            return [str(model["id"]) for model in self._whole("GET", "/v1/models")["data"]]
        except (KeyError, TypeError) as error:
            raise self._no_api() from error

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A whole answer. Raises RequestError if it was refused, EngineError if it failed."""
        return self._whole("POST", path, body)

    def _whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._told():
            answer = self._client.request(method, path, json=body)
        if answer.status_code != 200:
            raise self._refused(answer.status_code, answer.content, answer.headers)
        try:
            return answer.json()
        except ValueError as error:
            raise self._no_api() from error

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The chunks of a streamed answer, as they come. Closing the iterator ends the request.

        Raises:
            RequestError: it was refused. EngineError: it failed, or the stream broke off.
        """
        with self._told(), self._client.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                raise self._refused(answer.status_code, answer.read(), answer.headers)
            reader = SseReader()
            for piece in answer.iter_bytes():
                for data in reader.feed(piece):
                    if data == "[DONE]":
                        return
                    yield _chunk(data)
        raise EngineError(f"{self.address.name} ended the answer before it was whole")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            if self.address.uds is not None and not Path(self.address.uds).is_socket():
                raise httpx.ConnectError("there is no such socket")
            yield
        except httpx.ConnectError as error:
            message = f"no server answers at {self.address.name}: {_cause(error)}"
            raise ServerUnreachable(message, remedy=self.address.remedy()) from error
        except (httpx.HTTPError, UnicodeDecodeError) as error:
            raise EngineError(f"the connection to {self.address.name} failed: {_cause(error)}") from error

    def _refused(self, status: int, content: bytes, headers: Mapping[str, str]) -> QuireError:
        """The server's error envelope as an error of ours."""
        try:
            message = str(json.loads(content)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self._no_api(f" (status {status})")
        if status == 401:
            return RequestError(f"{self.address.name}: {message}", remedy="give the key with --key, or OPENAI_API_KEY")
        if status == 429 or status >= 500:
            after = headers.get("retry-after")
            remedy = f"try again in {after} s" if after else ""
            return EngineError(f"{self.address.name} cannot answer now: {message}", remedy=remedy)
        return RequestError(f"{self.address.name} refused: {message}")

    def _no_api(self, more: str = "") -> ServerUnreachable:
        message = f"what answers at {self.address.name} is no server of OpenAI's API{more}"
        return ServerUnreachable(message, remedy=self.address.remedy())


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise EngineError(f"the server sent an event that is no JSON: {data[:100]!r}") from error
    if not isinstance(chunk, dict):
        raise EngineError(f"the server sent an event that is no object: {data[:100]!r}")
    if problem := chunk.get("error"):
        message = problem.get("message", "") if isinstance(problem, dict) else problem
        raise EngineError(f"the answer failed: {message}")
    return chunk


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
