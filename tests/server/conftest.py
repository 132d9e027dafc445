"""One engine over quire-tiny for all tests of the server, and real servers over it on free ports."""

import asyncio
import selectors
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

import httpx
import pytest
from quire import AsyncLLM
from quire.plugin import MetricsInit
from quire_server.app import create_app
from quire_server.client.address import listening_url
from quire_server.listener import Listener, open_socket
from quire_server.metrics import PrometheusSink
from quire_server.settings import ServerSettings
from quire_server.state import ServerState


@pytest.fixture(scope="session")
def sink():
    return PrometheusSink(MetricsInit("quire-tiny"))


@pytest.fixture(scope="session")
def llm(sink):
    from quire.config import configure
    from quire.engine.build import engine_from
    from quire.registry import build_host

    options = {"max_num_seqs": 32, "num_kv_blocks": 600, "dtype": "float32"}
    served = AsyncLLM.over(engine_from(configure(options, environment={}), build_host()), [("prometheus", sink)])
    yield served
    served.shutdown()


class Running(NamedTuple):
    url: str
    state: ServerState
    listener: Listener


@contextmanager
def running(llm, sink=None, **settings):
    """A server in a thread of its own."""
    state = ServerState(llm, ServerSettings(port=0, **settings), metrics=sink.render if sink else None)
    if sink is not None:
        sink.watch(llm, state.admission.refused)
    socket = open_socket(state.settings)
    listener = Listener(create_app(state), state)
    thread = threading.Thread(target=listener.serve_on, args=(socket,))
    thread.start()
    try:
        while not listener.started:
            time.sleep(0.01)
        yield Running(
            listening_url(state.settings, state.settings.uds is None and socket.getsockname()[1]), state, listener
        )
    finally:
        listener.should_exit = True
        thread.join()
        socket.close()


@pytest.fixture(scope="session")
def server(llm, sink):
    """URL of a server with the default settings."""
    with running(llm, sink) as served:
        yield served.url


@pytest.fixture
def serve(llm):
    """Starts a server with further settings, over another engine if one is given."""
    return lambda other=None, **settings: running(other or llm, **settings)


@pytest.fixture(scope="session")
def http(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    """Whatever a test did, the engine's blocks come back."""
    yield
    deadline = time.monotonic() + 5
    while llm.engine.has_work() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.engine.kv_stats().used == 0


class InstantLoop(asyncio.SelectorEventLoop):
    """An event loop in which time is what is waited for, and passes at once."""

    def __init__(self):
        self.passed = 0.0
        super().__init__(Impatient(self))

    def time(self):
        return self.passed


class Impatient(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def select(self, timeout=None):
        self.loop.passed += max(0.0, timeout or 0.0)
        return super().select(0)


@pytest.fixture
def instantly():
    """Runs a coroutine where every wait is over at once, and has taken as long as it said."""

    def run(coroutine):
        with asyncio.Runner(loop_factory=InstantLoop) as runner:
            return runner.run(coroutine)

    return run
