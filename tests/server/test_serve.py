"""`quire serve` as a process: what it says, the addresses it takes, how it leaves, its exit codes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from quire.cli.app import app
from quire_server.listener import AddressTaken, open_socket
from quire_server.owners import port_owner, socket_owner
from quire_server.settings import ServerSettings
from typer.testing import CliRunner

LONG = {"prompt": "go on", "max_tokens": 1900, "ignore_eos": True, "stream": True}


def quire_serve(*arguments, stderr=subprocess.PIPE, **more):
    command = [sys.executable, "-m", "quire.cli", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stderr=stderr, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **more})


class Served(NamedTuple):
    process: subprocess.Popen
    block: str
    log: Path


@contextlib.contextmanager
def serving(log, *arguments, **more):
    """A server that has said that it is ready, and what it said."""
    with log.open("w") as told:
        process = quire_serve(*arguments, "--num-kv-blocks", "300", stderr=told, **more)
    try:
        while "  try  " not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Served(process, log.read_text(), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def tcp(tmp_path_factory):
    log = tmp_path_factory.mktemp("tcp") / "log"
    with serving(log, "--port", "0", QUIRE_SERVER__DRAIN='{"timeout": 60}') as served:
        yield served


@pytest.fixture(scope="module")
def uds(tmp_path_factory):
    """Over a Unix socket that a dead server has left behind; the engine in the same process, which starts sooner."""
    folder = tmp_path_factory.mktemp("uds")
    path = folder / "quire.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(folder / "log", "--uds", path, QUIRE_ENGINE__PROCESS="false") as served:
        yield path, served


def url(served):
    return re.search(r"^  page +(\S+)/$", served.block, re.MULTILINE)[1]


def test_the_line_to_paste_works(tcp):
    """Any free port was asked for, so that the line must hold the one that was found."""
    line = re.search(r"^  try +(.*)$", tcp.block, re.MULTILINE)[1]
    if shutil.which("curl") is None:
        words = re.fullmatch(r"curl (\S+) -H 'Content-Type: application/json' -d '(.*)'", line)
        answer = httpx.post(words[1], content=words[2], headers={"content-type": "application/json"}, timeout=60).json()
    else:
        answer = json.loads(subprocess.run(["bash", "-c", f"{line} -sS"], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"] == "72"
    for told in ("ready in", "model     quire-tiny", "context   2,048 tokens", "KV cache  4,784 tokens, 2.3 requests"):
        assert told in tcp.block


def test_it_says_what_it_loads_and_who_asked(tcp):
    with httpx.Client(base_url=url(tcp)) as client:
        client.get("/ready")
        client.get("/v1/models", headers={"X-Request-Id": "asked-1"})
    deadline = time.monotonic() + 5
    while "asked-1" not in (log := tcp.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)  # the line follows the answer
    for phase in ("building the model: ", "loading weights: ", "packing: "):
        assert log.index(phase) < log.index("ready in")
    assert re.search(r"^info: GET '/v1/models' 200 \d+ ms asked-1$", log, re.MULTILINE)
    assert "'/ready'" not in log


def test_the_line_to_paste_works_over_a_unix_socket(uds):
    line = re.search(r"^  try +(.*)$", uds[1].block, re.MULTILINE)[1]
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    answer = json.loads(subprocess.run(["bash", "-c", f"{line} -sS"], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"] == "72"


def test_a_busy_port_is_told_with_its_owner(tcp):
    port = url(tcp).rpartition(":")[2]
    with quire_serve("--port", port) as process:
        said = " ".join(process.stderr.read().split())  # without the console's line breaks
    assert process.returncode == 5
    assert "Address already in use" in said
    assert "choose another with --port" in said
    assert f"by process {tcp.process.pid} (" in said or not Path("/proc/net/tcp").exists()


def test_addresses_that_cannot_be_had(uds, tmp_path):
    """A Unix socket that a server listens on is not taken over; a file that is none stays."""
    (tmp_path / "file").write_text("mine")
    for settings, told in (
        ({"uds": uds[0]}, (f"process {uds[1].process.pid} (", "--uds")),
        ({"uds": tmp_path / "file"}, ("no socket", "--uds")),
        ({"uds": tmp_path / "nowhere" / "quire.sock"}, ("No such file", "--uds")),
        ({"host": "192.0.2.1"}, ("192.0.2.1:8000", "--host")),
    ):
        with pytest.raises(AddressTaken) as caught:
            open_socket(ServerSettings(**settings))
        assert caught.value.exit_code == 5
        for part in told:
            assert part in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds[0]))) as client:
        assert client.get("http://localhost/ready").status_code == 200


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        (2, ("--port", "70000"), "server.port is 70000"),
        (3, ("/nowhere/at-all", "--port", "0"), "/nowhere/at-all"),
        (4, ("--port", "0", "--num-kv-blocks", "999999999"), "999999999 KV blocks"),
    ],
)
def test_the_exit_code_says_what_was_wrong(code, arguments, told, monkeypatch):
    monkeypatch.setenv("QUIRE_ENGINE__PROCESS", "false")
    result = CliRunner().invoke(app, ["serve", *arguments], prog_name="quire")
    assert (result.exit_code, told in " ".join(result.output.split())) == (code, True), result.output


def test_nobody_owns_what_nobody_holds(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        assert port_owner(port) is None  # bound, but nobody listens
        held.listen()
        if Path("/proc/net/tcp").exists():
            assert f"process {os.getpid()}" in port_owner(port)
    assert port_owner(port) is None
    assert socket_owner(tmp_path / "none") is None


@contextlib.contextmanager
def streaming(client, **more):
    """A stream that has begun."""
    with client.stream("POST", "/v1/completions", json=LONG | more) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def wait_until_leaving(client):
    deadline = time.monotonic() + 10
    while client.get("/ready").status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_signal_ends_it_at_once(uds):
    """Runs behind the other tests of its server, which is gone afterwards."""
    path, served = uds
    transport = httpx.HTTPTransport(uds=str(path))
    client = httpx.Client(transport=transport, base_url="http://localhost", timeout=30)
    with client, streaming(client, n=16) as lines:
        served.process.send_signal(signal.SIGTERM)
        wait_until_leaving(client)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(5) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            list(lines)


def test_told_to_stop_it_refuses_and_finishes(tcp):
    """Runs behind the other tests of its server, which is gone afterwards."""
    with httpx.Client(base_url=url(tcp), timeout=60) as client, streaming(client, max_tokens=400) as lines:
        tcp.process.send_signal(signal.SIGTERM)
        wait_until_leaving(client)
        late = client.post("/v1/completions", json={"prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert late.headers["retry-after"]
        left = [line for line in lines if line]
    assert left[-1] == "data: [DONE]"
    assert json.loads(left[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert tcp.process.wait(20) == 0
