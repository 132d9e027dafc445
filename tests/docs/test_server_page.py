"""The snippets of docs/server.md, run against a live server."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from quire_server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "server.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(PAGE.read_text(encoding="utf-8"))
WRITTEN = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url():
    """A server as `quire serve` starts it, told to stop at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "quire.cli", "serve", "--port", str(port), "--num-kv-blocks", "300"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    found, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        assert server.poll() is None
        assert time.monotonic() < deadline
        try:
            if httpx.get(f"{found}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    yield found
    server.terminate()
    assert server.wait(30) == 0


PROGRAMS = [(text, BLOCKS[index + 1][1]) for index, (language, text) in enumerate(BLOCKS) if language == "python"]


@pytest.mark.parametrize(("text", "expected"), PROGRAMS)
def test_python(url, text, expected, tmp_path):
    (tmp_path / "snippet.py").write_text(text.replace(WRITTEN, url))
    answer = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.stdout, answer.stderr) == (expected, "")


SCRIPTS = [(text, BLOCKS[index + 1]) for index, (language, text) in enumerate(BLOCKS) if language == "bash"]


@pytest.mark.parametrize(("text", "after"), SCRIPTS)
def test_shell(url, text, after):
    """What it prints stands below it, with ... for figures that differ, or is an answer of the API."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    answer = subprocess.run(
        ["sh", "-ec", text.replace(WRITTEN, url)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    if after[0] == "text":
        assert re.fullmatch(re.escape(after[1]).replace(r"\.\.\.", ".*"), answer.stdout), answer.stdout
    else:
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "72"


def test_the_configuration_is_taken():
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    settings = ServerSettings(**yaml.safe_load(text)["server"])
    assert (settings.queue.max_requests, settings.drain.grace) == (256, 5)


def test_every_setting_is_told():
    text = PAGE.read_text()
    fields = set(ServerSettings.model_fields) - {"host", "port", "served_names"}
    for name in fields:
        assert f"`{name}`" in text or f"`{name}." in text, name
    for name, default in (("max_requests", "1,024"), ("timeout", "60"), ("sse_keepalive", "15"), ("sse_pace", "0.05")):
        assert name in text
        assert default in text


def test_every_path_is_told(url):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    text = PAGE.read_text()
    for path in paths:
        assert f"`{path}`" in text or f" {path}`" in text, path
