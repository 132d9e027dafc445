"""`quire ps`: one row per server, whatever it answers."""

import json
import logging

import pytest
from pydantic import SecretStr
from quire.cli.app import app
from typer.testing import CliRunner


@pytest.fixture
def quire(monkeypatch):
    """Runs the program; its log is put back as it was."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    logger = logging.getLogger("quire")
    before = logger.handlers[:], logger.level, logger.propagate
    yield lambda *arguments: CliRunner().invoke(app, ["ps", *map(str, arguments)], prog_name="quire")
    logger.handlers[:], logger.level, logger.propagate = before


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
    table = quire(server).stdout.splitlines()
    assert table[0].split() == ["URL", "MODEL", "STATE", "RUNNING", "WAITING", "CACHE", "TOKENS"]
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
