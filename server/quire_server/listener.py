"""uvicorn, with our way of stopping: first refuse, then wait, then end what is left; a second signal ends at once."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket as sockets
import ssl
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from quire import ConfigError

from quire_server.owners import port_owner, socket_owner
from quire_server.settings import ServerSettings
from quire_server.state import ServerState

logger = logging.getLogger("quire.server")

BACKLOG = 2048
POLL = 0.05
"""Seconds between two looks at whether all requests, or the engine, have ended."""
OTHER_UDS = "choose another with --uds"
LAST_WORDS = 1.0
"""Seconds in which a server without an engine still tells its clients so."""


def open_socket(settings: ServerSettings) -> sockets.socket:
    """The listening socket; a Unix socket that nobody listens on any more is replaced.

    Raises:
        ConfigError: the address cannot be had; names who holds it, if that can be seen.
    """
    if settings.uds is not None:
        family, address = sockets.AF_UNIX, str(settings.uds)
        _make_way(settings.uds)
    else:
        family = sockets.AF_INET6 if ":" in settings.host else sockets.AF_INET
        address = (settings.host, settings.port)  # type: ignore[assignment]
    found = sockets.socket(family, sockets.SOCK_STREAM)
    try:
        if settings.uds is None:
            found.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise _refusal(settings, error) from error
    return found


def _make_way(path: Path) -> None:
    """Remove what a server left behind. Raises ConfigError if one is there, or it is no socket."""
    if not path.exists():
        return
    if not path.is_socket():
        raise AddressTaken(f"cannot listen on {path}: the file is there and no socket", remedy=OTHER_UDS)
    try:
        owner = socket_owner(path)
    except OSError as error:
        raise AddressTaken(f"cannot listen on {path}: {error.strerror or error}", remedy=OTHER_UDS) from error
    if owner is not None:
        raise AddressTaken(f"cannot listen on {path}: {owner} does so", remedy=f"stop it, or {OTHER_UDS}")
    path.unlink(missing_ok=True)


def _refusal(settings: ServerSettings, error: OSError) -> AddressTaken:
    if settings.uds is not None:
        return AddressTaken(f"cannot listen on {settings.uds}: {error.strerror}", remedy=OTHER_UDS)
    where = f"{settings.host}:{settings.port}"
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        owner = port_owner(settings.port) if error.errno == errno.EADDRINUSE else None
        held = f" by {owner}" if owner else ""
        remedy = "choose another with --port, or 0 for any free one"
        return AddressTaken(f"cannot listen on {where}: {error.strerror}{held}", remedy=remedy)
    return AddressTaken(
        f"cannot listen on {where}: {error.strerror}", remedy="name an address of this machine by --host"
    )


def check_tls(settings: ServerSettings) -> None:
    """Raises ConfigError if certificate and key cannot be used."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise ConfigError("server.ssl_keyfile is given without a certificate", remedy="give server.ssl_certfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        names = " and ".join(str(file) for file in (settings.ssl_certfile, settings.ssl_keyfile) if file is not None)
        remedy = "give a certificate and its key, both PEM, by --ssl-certfile and --ssl-keyfile"
        raise ConfigError(f"TLS cannot be served with {names}: {error.strerror or error}", remedy=remedy) from error


class AddressTaken(ConfigError):
    """The address to listen on cannot be had."""

    exit_code = 5


class Listener(uvicorn.Server):
    """Serves one application until it is told to stop."""

    def __init__(self, app: Any, state: ServerState) -> None:
        settings = state.settings
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                timeout_graceful_shutdown=5,
            )
        )
        # Its lines would hold query strings; the middleware writes our own.
        logging.getLogger("uvicorn.access").disabled = True
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._told = False

    def serve_on(self, listening: sockets.socket) -> None:
        """Serve until told to stop."""
        self.run([listening])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, the second ends the process."""
        if self._told:
            os._exit(128 + sig)
        self.stop_soon()

    def stop_soon(self) -> None:
        """Begin to drain; from any thread, or a signal handler."""
        self._told = True
        if self._loop is None:  # not serving yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.ensure_future(self._watch_engine())
        await super().startup(sockets)

    async def _watch_engine(self) -> None:
        """A server whose engine is dead for good must end, so that whoever started it can start another."""
        while not self.should_exit:
            if (cause := self._state.llm.cause_of_death) is not None:
                logger.error("%s; the server ends", cause)
                await asyncio.sleep(LAST_WORDS)
                self.should_exit = True
            await asyncio.sleep(POLL)

    def _begin_drain(self) -> None:
        self._draining = self._draining or asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        state, drain = self._state, self._state.settings.drain
        state.is_leaving = True
        logger.warning("stopping: %d requests under way", state.admission.num_requests)
        await asyncio.sleep(drain.grace)
        state.admission.is_draining = True
        deadline = time.monotonic() + drain.timeout
        while state.admission.num_requests and time.monotonic() < deadline:
            await asyncio.sleep(POLL)
        if state.admission.num_requests:
            logger.warning("ending %d requests that have not finished", state.admission.num_requests)
            await asyncio.to_thread(state.llm.shutdown)
            while state.admission.num_requests and time.monotonic() < deadline + 5:
                await asyncio.sleep(POLL)
        self.should_exit = True
