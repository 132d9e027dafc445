"""`quire run` and `quire bench` on a real, tiny checkpoint, in this process and in one of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import signal
import subprocess
import sys

import pytest
from quire.cli.app import app
from quire.cli.chat import Chat, changed
from quire.cli.conversation import Writer, shown
from quire.cli.run import names_a_model
from quire.cli.talk import Talker
from quire.config import configure
from quire.engine.build import engine_from
from quire.errors import RequestError
from quire.params import SamplingParams, sampling_defaults
from quire.plugin import ReasoningDelta, TextDelta
from quire.registry import build_host
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def parts(chat_model):
    host = build_host()
    options = {"model": str(chat_model), "max_num_seqs": 2, "max_model_len": 256}
    engine = engine_from(configure(options, environment={}), host)
    yield engine, host
    engine.shutdown()


@pytest.fixture
def talker(parts):
    return Talker(parts[0], params=SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))


def quire(*arguments, **more):
    logger = logging.getLogger("quire")  # the program sets up the log; other tests expect it untouched
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="quire", **more)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before


def test_one_shot_from_an_argument_and_from_a_pipe(chat_model):
    result = quire("run", chat_model, "hello", "--max-tokens", "6", "--stats")
    assert result.exit_code == 0, result.stderr
    assert "6 out" in result.stderr
    assert result.stdout.endswith("\n")
    piped = quire("run", chat_model, "--max-tokens", "6", input="hello")
    assert piped.exit_code == 0, piped.stderr
    assert piped.stdout == result.stdout
    empty = quire("run", chat_model, input="")
    assert empty.exit_code == 2
    assert "standard input is empty" in empty.stderr


def test_a_pool_that_does_not_fit_exits_4(chat_model):
    result = quire("run", chat_model, "x", "--num-kv-blocks", "2147483648")
    assert result.exit_code == 4
    assert "num_kv_blocks" in result.stderr


def test_interrupting_one_shot_exits_130(chat_model):
    """Ctrl-C at a terminal: the answer stops, the program says so with its exit code."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "quire.cli", "run", str(chat_model), "x", "--max-tokens", "4000"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        os.read(master, 1)  # the first character of the answer
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal is gone with the program
            while os.read(master, 4096):
                pass
        os.close(master)
        assert process.wait(timeout=60) == 130, process.stderr.read()
        assert b"interrupted" in process.stderr.read()


def test_a_conversation_keeps_its_turns(talker, capsys):
    first = talker.ask("one")
    assert capsys.readouterr().out == first.text
    assert [m["role"] for m in talker.messages] == ["user", "assistant"]
    second = talker.ask("two")
    assert second.num_prompt_tokens > first.num_prompt_tokens
    assert second.num_cached_tokens > 0
    assert (second.num_output_tokens, second.finish_reason) == (6, "length")
    talker.reset()
    assert talker.ask("one").text == first.text


def test_raw_has_no_template_and_no_memory(talker):
    talker.raw = True
    assert talker.ask("abc").num_prompt_tokens == 3
    assert talker.messages == []


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(talker):
    talker.ask("one")
    before = list(talker.messages)
    with pytest.raises(RequestError, match="max_model_len 256"):
        talker.ask("x" * 300)
    assert talker.messages == before
    assert talker.engine.kv_stats().used == 0


def test_reasoning_goes_elsewhere_than_the_answer(talker, capsys):
    talker.think = True
    answer = talker.ask("one")
    out, err = capsys.readouterr()
    assert answer.text == ""  # the template opened the reasoning, and these weights never close it
    assert out == ""
    assert err.strip()


def test_a_models_text_cannot_steer_the_terminal(talker, monkeypatch, capsys):
    assert shown("a\x1b[2Jb\x07\tc\nd\x9b\r") == "a\ufffd[2Jb\ufffd\tc\nd\ufffd\ufffd"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    writer = Writer()
    text = writer.write([ReasoningDelta("\x1b]0;x\x07"), TextDelta("ok\x1b[H")])
    assert text == "ok\x1b[H"  # what the next turn is told stays as it was made
    assert capsys.readouterr().out == "\x1b[2m\ufffd]0;x\ufffd\x1b[0m\nok\ufffd[H"


def chat(talker, *lines):
    """Run a chat on these lines; an exception in their place is raised."""
    feed = iter(lines)

    def read(prompt):
        line = next(feed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    Chat(talker, read).loop()
    return list(feed)


def test_chat_commands(talker, capsys):
    left = chat(talker, "", "/help", "/set temperature=0.5 max_tokens=3", "/set", "hello", "/stats", "/think on",
                "/system be brief", "/reset", "/nonsense", "/think perhaps", "/set oops", "/set top_p=9", "/exit",
                "never read")  # fmt: skip
    assert left == ["never read"]
    assert (talker.params.temperature, talker.params.max_tokens, talker.params.top_p) == (0.5, 3, 1.0)
    assert talker.params.ignore_eos
    assert (talker.think, talker.system, talker.messages) == (True, "be brief", [])
    err = capsys.readouterr().err
    for part in (
        "/reset",
        "max_tokens=3",
        "3 out",
        "KV blocks",
        "'/nonsense'",
        "on or off",
        "NAME=VALUE",
        "top_p is 9",
    ):
        assert part in err


def test_chat_ends_at_the_end_of_input(talker):
    assert chat(talker) == []


def test_ctrl_c_at_the_prompt_twice_leaves(talker):
    with pytest.raises(KeyboardInterrupt):
        chat(talker, KeyboardInterrupt(), KeyboardInterrupt())
    assert chat(talker, KeyboardInterrupt(), "/help", KeyboardInterrupt(), "/exit") == []


def test_ctrl_c_stops_an_answer_and_frees_its_blocks(talker, monkeypatch):
    step = talker.engine.step
    steps = []

    def counting():
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(talker.engine, "step", counting)
    talker.params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    answer = talker.ask("one")
    assert answer.finish_reason == "abort"
    assert answer.num_output_tokens < 10
    assert talker.engine.kv_stats().used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_during_an_answer_ends_the_program(talker, monkeypatch):
    step = talker.engine.step

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(talker.engine, "step", interrupted)
    monkeypatch.setattr(talker.engine, "abort", lambda request_id: [])  # an abort that takes its time
    talker.params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        talker.ask("one")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    talker.engine.fail("cleared by the test")


def test_sampling_follows_the_checkpoint():
    assert sampling_defaults({}) == {"temperature": 0.0}
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 3}
    assert sampling_defaults(said) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0}
    assert sampling_defaults({"temperature": 0.6}) == {"temperature": 0.0}
    refused = quire("run", "hello there", "--temperature", "-1")
    assert refused.exit_code == 2
    assert "temperature is -1" in refused.stderr


def test_set_replaces_only_what_it_names():
    params = SamplingParams(temperature=0.3, stop="x")
    assert changed(params, {"max_tokens": "9", "stop": "[a, b]"}) == SamplingParams(
        temperature=0.3, stop=("a", "b"), max_tokens=9
    )


def test_one_argument_is_a_model_or_a_prompt(tmp_path):
    assert names_a_model("org/name")
    assert names_a_model("quire-tiny")
    assert names_a_model(str(tmp_path))
    assert names_a_model("./not-here")
    assert not names_a_model("What is 12 + 30?")


def test_bench(chat_model):
    result = quire("bench", chat_model, "--batch", "1,3", "--input-len", "20", "--output-len", "6", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["prefill"] > 0
        assert row["decode"] > 0
        assert sum(row["steps"].values()) == pytest.approx(1.0)
    table = quire("bench", chat_model, "--batch", "1", "--input-len", "9", "--output-len", "3")
    assert "DECODE tok/s" in table.stdout
    too_long = quire("bench", chat_model, "--input-len", "4000", "--output-len", "100")
    assert too_long.exit_code == 2
    assert "max_model_len" in too_long.stderr
