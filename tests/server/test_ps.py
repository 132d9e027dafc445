"""`quire ps`: one row per server, whatever it answers."""

import json

import httpx
import pytest
from pydantic import SecretStr
from quire.cli.app import app
from typer.testing import CliRunner


@pytest.fixture
def quire(monkeypatch):
    """Runs the program."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda *arguments, before=(): CliRunner().invoke(
        app, [*map(str, before), "ps", *arguments], prog_name="quire"
    )


def test_a_row_per_server(quire, server, serve):
    with serve(served_names=("one", "two")) as (second, state, _):
        state.is_leaving = True
        result = quire(f"{server}/v1", second, "--json")
    assert result.exit_code == 0, result.output
    first, other = json.loads(result.stdout)
    assert (first["url"], first["model"], first["state"]) == (server, "quire-tiny", "ready")
    assert (first["running"], first["waiting"], first["cache"]) == (0, 0, "0.0 %")
    assert first["tokens"] >= 0
    assert (other["model"], other["state"], other["running"]) == ("one, two", "leaving", "")
    info = httpx.get(f"{server}/server_info").json()
    assert (first["context"], first["version"]) == (info["max_model_len"], info["version"])
    assert first["kv_tokens"] == 599 * 16
    assert first["plugins"] == info["plugins"]
    table = quire(server).stdout.splitlines()
    assert table[0].split() == ["URL", "MODEL", "STATE", "RUNNING", "WAITING", "CACHE", "TOKENS", "CONTEXT",
                                "VERSION"]  # fmt: skip
    assert "quire-tiny" in table[1]


def test_a_server_that_does_not_answer(quire, server):
    result = quire("http://127.0.0.1:9", server, "--json")
    assert result.exit_code == 1
    assert [row["state"] for row in json.loads(result.stdout)] == ["no answer", "ready"]


def test_a_key_that_is_asked_for(quire, serve):
    with serve(api_keys=(SecretStr("key-of-the-team"),)) as (url, _, _):
        refused = quire(url)
        assert (refused.exit_code, "asks for a key" in refused.stderr) == (1, True)
        assert quire(url, "--key", "key-of-the-team").exit_code == 0


def test_a_port_and_the_configured_server(quire, serve, server, tmp_path):
    port = server.rpartition(":")[2]
    (row,) = json.loads(quire(port, "--json").stdout)
    assert (row["url"], row["state"]) == (server, "ready")
    with serve(uds=tmp_path / "s", api_keys=(SecretStr("key-of-the-team"),)):
        (tmp_path / "c.yaml").write_text(f"server: {{uds: {tmp_path}/s, api_keys: [key-of-the-team]}}")
        result = quire("--json", before=("-c", tmp_path / "c.yaml"))
    assert result.exit_code == 0, result.output
    assert [row["state"] for row in json.loads(result.stdout)] == ["ready"]
    assert quire("no server").exit_code == 2


def test_a_server_of_another_program(quire, monkeypatch):
    """One that has an engine's routes, with other things in them."""

    def answer(request):
        bodies = {"/v1/models": {"data": [{"id": "theirs"}]}, "/server_info": {"version": 1}, "/ready": {}}
        body = bodies.get(request.url.path)
        return httpx.Response(200, text="x 1\n") if body is None else httpx.Response(200, json=body)

    client = httpx.Client
    monkeypatch.setattr("httpx.Client", lambda **more: client(**more | {"transport": httpx.MockTransport(answer)}))
    (row,) = json.loads(quire("8123", "--json").stdout)
    assert (row["model"], row["state"], row["running"], row["context"]) == ("theirs", "ready", "", "")
