"""Servers as peers: a small one of each dialect is asked over HTTP, and what goes wrong is told."""

import os
import subprocess
import sys
import textwrap
import time
import types

import pytest
from cpu_peers.over_http import Dialect, Server, free_port
from cpu_peers.peers import llama_server, quire_server
from cpu_peers.protocol import Request, Unavailable, ask
from cpu_peers.turns import started
from cpu_peers.workload import Point

SMALL = textwrap.dedent("""
    import http.server, json, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt, count = body["prompt"], body.get("n_predict", body.get("max_tokens"))
            if 13 in prompt:
                self.send_error(400, "no thirteens")
                return
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for token in range(prompt[0], prompt[0] + count - (12 in prompt)):
                event = {"tokens": [token], "choices": [{"text": "", "token_ids": [token]}]}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
            self.wfile.write(b"data: [DONE]\\n\\n")
            self.close_connection = True

    print("listening", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
""")
LLAMA = Dialect("/completion", llama_server._body, lambda event: event["tokens"])
QUIRE = Dialect("/v1/completions", quire_server._body, quire_server._tokens)


@pytest.fixture
def serve(tmp_path):
    """Starts servers of a dialect, and ends them."""
    servers = []

    def start(dialect):
        port = free_port()
        command = [sys.executable, "-c", SMALL, str(port)]
        servers.append(Server(command, port, dialect, 100, tmp_path / "server.log"))
        return servers[-1]

    yield start
    for server in servers:
        server._process.kill()
        server._process.wait()


def drain(server):
    while server.busy():
        server.step()


@pytest.mark.parametrize("dialect", [LLAMA, QUIRE], ids=["llama", "quire"])
def test_requests_run_at_once_and_each_gets_its_tokens_in_order(serve, dialect):
    server = serve(dialect)
    assert not server.busy()
    wanted = {str(first): list(range(first, first + 5)) for first in (20, 40, 60)}
    for key in wanted:
        server.add(key, [int(key), 1], 5)
    found = {key: [] for key in wanted}
    while server.busy():
        for key, tokens in server.step():
            found[key] += tokens
    assert found == wanted
    assert server.step() == []


@pytest.mark.parametrize(("prompt", "words"), [([13], "status 400"), ([20, 12], "ended with 2 of 3 tokens")])
def test_a_refusal_and_an_early_end_are_told(serve, prompt, words):
    server = serve(LLAMA)
    server.add("mine", prompt, 3)
    with pytest.raises(RuntimeError, match=f"mine: .*{words}"):
        drain(server)


def test_a_server_that_ends_is_quoted_past_its_frames(tmp_path):
    code = "print('╭──╮\\n│ no such flag │\\n╰──╯'); raise SystemExit(2)"
    with pytest.raises(RuntimeError, match=r"ended with status 2: no such flag$"):
        Server([sys.executable, "-c", code], free_port(), LLAMA, 100, tmp_path / "log")


def test_a_server_takes_no_turns(serve):
    with pytest.raises(Unavailable, match="takes no turns: serves requests"):
        started(serve(LLAMA), Point("decode", 1, 8), 4, 0)


def test_the_worker_takes_its_server_with_it(tmp_path):
    code = """
import subprocess, sys
print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, file=sys.stderr)
raise SystemExit(1)
"""
    answer = ask([sys.executable, "-c", code], Request("measure", "", "", "bf16"), os.environ, tmp_path)
    left = int(answer.reasons["all"].rpartition(" ")[2])
    until = time.monotonic() + 10
    while _runs(left):
        assert time.monotonic() < until
        time.sleep(0.01)


def _runs(process):
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) and not found.stdout.startswith("Z")


def test_quire_is_served_with_the_engines_settings():
    flags = quire_server._flags(Request("measure", "", "", "int4", ["served:64"]))
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--dtype": "bfloat16",
        "--quantization": "int4",
        "--num-kv-blocks": "2241",
        "--max-num-seqs": "64",
        "--max-model-len": "528",
        "--block-size": "16",
    }
    assert "--quantization" not in quire_server._flags(Request("measure", "", "", "bf16", ["served:64"]))


def test_llamas_programs_are_built_once_and_a_failure_is_told(tmp_path, monkeypatch):
    status, commands = 1, []

    def run(command, cwd, **_):
        commands.append(command)
        if "download" in command:
            tree = cwd / "p-1" / "vendor" / "llama.cpp"
            tree.mkdir(parents=True)
            subprocess_run(["tar", "-czf", "p.tar.gz", "p-1"], cwd=cwd, check=True)
        elif "-C" in command:
            (cwd / "build" / "bin").mkdir(parents=True)
            for name in llama_server.PROGRAMS:
                (cwd / "build" / "bin" / name).write_text(name)
        return types.SimpleNamespace(returncode=status)

    subprocess_run = subprocess.run
    monkeypatch.setattr(llama_server.subprocess, "run", run)
    monkeypatch.setattr(llama_server.sys, "prefix", str(tmp_path))
    with pytest.raises(Unavailable, match=r"failed: see llama\.cpp\.log"):
        llama_server.programs()
    status = 0
    assert (llama_server.programs() / "llama-server").read_text() == "llama-server"
    count = len(commands)
    assert llama_server.programs() == tmp_path / "llama.cpp"
    assert len(commands) == count
    assert tuple(commands[-1][-2:]) == llama_server.PROGRAMS
