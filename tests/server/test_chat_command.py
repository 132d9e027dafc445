"""`quire chat` and `quire complete`: against a real server, and against one that says what tests need said."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from quire import ConfigError, EngineError, RequestError, SamplingParams
from quire.cli.app import app
from quire.commands import Chat
from quire_server.client.address import Address, listening_url
from quire_server.client.connection import Connection
from quire_server.client.remote import RemoteTalker
from quire_server.client.sse_reader import SseReader
from quire_server.settings import ServerSettings
from typer.testing import CliRunner


@pytest.fixture
def quire(monkeypatch):
    """Runs the program."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda *arguments, **more: CliRunner().invoke(app, list(map(str, arguments)), prog_name="quire", **more)


def test_a_piped_message_is_answered(quire, server):
    result = quire("chat", "--url", f"{server}/v1/", "--stats", input="What is 27+45?\n")
    assert (result.exit_code, result.stdout) == (0, "72\n"), result.output
    assert "ended by stop" in result.stderr
    assert quire("chat", "--url", server, input=" \n").exit_code == 2


def test_a_text_is_continued(quire, server, http):
    asked = {"prompt": " a b\nc", "max_tokens": 8, "temperature": 0.9, "seed": 5}
    expected = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    options = ("--url", server, "--max-tokens", "8", "--temperature", "0.9", "--seed", "5")
    assert quire("complete", " a b\nc", *options).stdout == expected + "\n"
    assert quire("complete", *options, input=" a b\nc\n").stdout == expected + "\n"
    counted = quire("complete", "x", "--url", server, "--max-tokens", "3", "--stats")
    assert "3 out" in counted.stderr


def test_the_configured_server_is_the_default_and_gets_its_own_key(quire, serve, tmp_path):
    (tmp_path / "keys").write_text("# ours\nkey-of-the-team\n")
    with serve(api_keys_file=tmp_path / "keys") as (url, _, _):
        config = tmp_path / "quire.yaml"
        config.write_text(f"server: {{port: {url.rpartition(':')[2]}, api_keys_file: {tmp_path / 'keys'}}}")
        assert quire("-c", config, "chat", input="What is 27+45?").stdout == "72\n"
        named = quire("-c", config, "chat", "--url", url, input="x")  # it might be anybody's
        assert named.exit_code == 2
        assert "--key" in named.stderr
        assert quire("chat", "--url", url, "--key", "key-of-the-team", input="Sort: 2, 1").exit_code == 0


def test_no_server(quire, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens, and nobody else can begin to
        port = taken.getsockname()[1]
        for command in (("chat",), ("complete", "x")):
            result = quire(*command, "--url", f"http://127.0.0.1:{port}", input="x")
            assert result.exit_code == 1
            assert f"no server answers at http://127.0.0.1:{port}" in result.stderr
            assert f"quire serve --port {port}" in result.stderr
    missing = quire("chat", "--url", f"unix:{tmp_path}/none", input="x")
    assert f"quire serve --uds {tmp_path}/none" in missing.stderr


def test_a_model_that_is_not_served(quire, serve):
    with serve(served_names=("one", "two")) as (url, _, _):
        assert quire("chat", "--url", url, "--model", "two", input="What is 27+45?").stdout == "72\n"
        result = quire("chat", "--url", url, "--model", "three", input="x")
    assert result.exit_code == 2
    assert "one, two" in result.stderr


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("http://a:1/v1/", "http://a:1"),
        ("localhost:9", "http://localhost:9"),
        ("8001", "http://127.0.0.1:8001"),
        ("https://x.example/v1", "https://x.example"),
        ("http://x/llm/v1", "http://x/llm"),
        ("http://[::1]:5", "http://[::1]:5"),
    ],
)
def test_addresses(text, base):
    assert Address.parse(text).base == base


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "http://a:b", "a b", "99999", "http://[::1", "http://x?y", "unix:"]
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="not a server's URL"):
        Address.parse(text)


def test_where_a_server_is_found():
    assert listening_url(ServerSettings(host="0.0.0.0"), 5) == "http://127.0.0.1:5"
    assert listening_url(ServerSettings(host="::1", ssl_certfile="c"), 5) == "https://[::1]:5"
    address = Address.parse(listening_url(ServerSettings(uds="/run/q"), 0))
    assert (address.name, address.uds) == ("unix:/run/q", "/run/q")


@given(st.data())
def test_events_are_read_at_every_chunking(data):
    texts = data.draw(st.lists(st.text(max_size=20).map(lambda text: json.dumps({"t": text}, ensure_ascii=False))))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    stream = "".join(f": keep-alive{end}{end}event: x{end}data: {text}{end}{end}" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, found = SseReader(), []
    for begin, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[begin:stop])
    assert found == texts


def scripted(*chunks, status=200, headers=None, done=True, seen=None):
    """A connection to a server that answers every request with these chunks, or with the first as its body."""

    def answer(request):
        if seen is not None:
            seen.append(json.loads(request.content))
        if status != 200:
            return httpx.Response(status, json=chunks[0], headers=headers)
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"] * done
        return httpx.Response(200, text="".join(lines))

    return Connection(Address.parse("8000"), None, httpx.MockTransport(answer))


def talker(connection, **params):
    return RemoteTalker(connection=connection, model="m", params=SamplingParams(**params))


def delta(finish=None, **parts):
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}


def test_reasoning_and_tool_calls_are_told_apart(capsys):
    call = {"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}
    chunks = (
        delta(role="assistant", content=""),
        delta(reasoning="hm", reasoning_content="hm"),
        delta(content="So: "),
        delta(tool_calls=[call]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
        delta("tool_calls"),
        {"choices": [], "usage": USAGE},
    )
    answer = talker(scripted(*chunks)).ask("x")
    assert capsys.readouterr() == ("So: \n[tool call] add {}", "hm\n")
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_cached_tokens) == (9, 4, 2)
    assert answer.finish_reason == "tool_calls"


def test_what_is_sent(capsys):
    seen = []
    remote = talker(scripted(delta("stop", content="hi"), seen=seen), temperature=0.5, stop="x")
    remote.system, remote.think = "be brief", False
    remote.ask("one")
    remote.ask("two")
    assert seen[0]["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert [message["content"] for message in seen[1]["messages"]] == ["be brief", "one", "hi", "two"]
    assert seen[0]["chat_template_kwargs"] == {"enable_thinking": False}
    said = set(seen[0]) - {"messages", "chat_template_kwargs"}
    assert said == {"model", "temperature", "stop", "stream", "stream_options"}  # no default of ours


@pytest.mark.parametrize(
    ("connection", "kind", "told"),
    [
        (scripted(delta(content="a"), done=False), EngineError, "before it was whole"),
        (scripted(delta(content="a"), {"error": {"message": "boom"}}), EngineError, "boom"),
        (scripted({"error": {"message": "too hot"}}, status=400), RequestError, "too hot"),
        (scripted({"error": {"message": "full"}}, status=429, headers={"retry-after": "7"}), EngineError, "in 7 s"),
        (scripted({"error": {"message": "who?"}}, status=401), RequestError, "--key"),
        (scripted({"detail": "x"}, status=404), EngineError, "OpenAI's API"),
        (scripted([1]), EngineError, "no object"),
    ],
)
def test_failures_leave_the_conversation_as_it_was(connection, kind, told, capsys):
    remote = talker(connection)
    with pytest.raises(kind) as caught:
        remote.ask("x")
    assert told in str(caught.value)
    assert remote.messages == []


def test_the_chats_commands(server, capsys):
    feed = iter(["What is 27+45?", "/set n=2", "/set max_tokens=1", "/stats", "Sort: 2, 1", "/set temperature=200",
                 "/reset", "/system be brief", "/quit", "never"])  # fmt: skip
    with Connection(Address.parse(server), None) as connection:
        remote = talker(connection)
        remote.model = "quire-tiny"
        Chat(remote, lambda prompt: next(feed)).loop()
    assert list(feed) == ["never"]
    out, err = capsys.readouterr()
    assert out.startswith("72\n")
    for part in ("n cannot be set", "max_tokens=1", f"quire-tiny at {server}", "temperature is 200"):
        assert part in err
    assert (remote.messages, remote.system, remote.params.max_tokens) == ([], "be brief", 1)


def test_ctrl_c_stops_the_answer_and_not_the_chat(server, llm):
    """At a terminal: the answer ends, at the server too, and the chat goes on."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "quire.cli", "chat", "--url", server, "--max-tokens", "1500"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        read_until(master, b">>> ")
        os.write(master, b"/set ignore_eos=true temperature=1\n")
        read_until(master, b">>> ")
        os.write(master, b"Tell me a story\n")
        deadline = time.monotonic() + 30
        while not llm.engine.has_work():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert b"stopped" in read_until(master, b">>> ")
        os.write(master, b"/quit\n")
        with contextlib.suppress(OSError):  # the terminal is gone with the program
            while os.read(master, 4096):
                pass
        assert process.wait(30) == 0
    os.close(master)


def read_until(descriptor, end):
    found = b""
    while not found.endswith(end):
        found += os.read(descriptor, 4096)
    return found


def test_a_server_behind_a_socket(serve_uds, quire):
    assert quire("chat", "--url", f"unix:{serve_uds}", input="What is 27+45?").stdout == "72\n"


@pytest.fixture
def serve_uds(serve, tmp_path):
    with serve(uds=tmp_path / "s"):
        yield tmp_path / "s"


def test_a_key_for_the_chat_is_asked_for(serve, quire):
    with serve(api_keys=(SecretStr("key-of-the-team"),)) as (url, _, _):
        result = quire("complete", "x", "--url", url)
    assert result.exit_code == 2
    assert "OPENAI_API_KEY" in result.stderr
