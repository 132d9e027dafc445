"""`quire batch`: every line gets one result, whatever it holds, and a run that was ended goes on."""

import asyncio
import itertools
import json
import random

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire import ConfigError
from quire.cli.app import app
from quire_server.batch import Line, answered, client_for, read_lines, run_batch
from quire_server.client.address import Address
from quire_server.client.retry import Backoff, advised_wait
from typer.testing import CliRunner


def request_line(custom_id, content="What is 27+45?", **more):
    body = {"model": "quire-tiny", "messages": [{"role": "user", "content": content}], **more.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | more


@pytest.fixture
def source(tmp_path):
    lines = [
        request_line("a"),
        request_line("b", "Sort: 42, 7, 19"),
        request_line("bad-body", body={"temperature": -1}),
        request_line("a"),
        request_line("stream", body={"stream": True}),
        request_line("path", url="/v1/embeddings"),
        request_line("method", method="GET"),
        {"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}},
        {"url": "/v1/completions", "body": {}},
        {"custom_id": "no-body", "url": "/v1/completions"},
        [7],
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n{broken\n")
    return file


def results(target):
    return {result["custom_id"]: result for result in map(json.loads, target.read_text().splitlines())}


def run(server, source, target, concurrency=4):
    async def main():
        async with client_for(Address.parse(server), None) as client:
            return await run_batch(client, read_lines(source), target, concurrency)

    return asyncio.run(main())


def test_every_line_has_one_result(server, source, tmp_path):
    target = tmp_path / "out.jsonl"
    summary = run(server, source, target)
    found = results(target)
    assert len(target.read_text().splitlines()) == len(found) == 12
    assert (summary.succeeded, summary.failed, summary.skipped) == (3, 9, 0)
    answer = found["a"]["response"]
    assert (answer["status_code"], answer["body"]["choices"][0]["message"]["content"]) == (200, "72")
    assert answer["request_id"]
    assert found["b"]["response"]["body"]["choices"][0]["message"]["content"] == "7, 19, 42"
    assert found["text"]["response"]["body"]["usage"]["completion_tokens"] <= 2
    assert found["bad-body"]["response"]["status_code"] == 400
    assert "temperature" in found["bad-body"]["response"]["body"]["error"]["message"]
    problems = {key: result["error"]["message"] for key, result in found.items() if result["error"]}
    assert set(problems) == {"line-4", "stream", "path", "method", "line-9", "no-body", "line-11", "line-13"}
    assert "earlier line" in problems["line-4"]
    assert "no JSON" in problems["line-13"]


def test_an_ended_run_goes_on(server, source, tmp_path):
    target = tmp_path / "out.jsonl"
    run(server, source, target)
    whole = target.read_text().splitlines(keepends=True)
    kept = [line for line in whole if json.loads(line)["custom_id"] in ("a", "path")]
    target.write_text("".join(kept) + whole[0][:20])  # ended in the middle of a write
    summary = run(server, source, target)
    assert summary.skipped == 2
    assert target.read_text().startswith("".join(kept))
    assert len(results(target)) == len(target.read_text().splitlines()) == 12
    assert run(server, source, target).skipped == 12


def test_another_file_is_not_written_to(tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("my notes\n")
    with pytest.raises(ConfigError, match="no result of a batch"):
        answered(target)
    assert target.read_text() == "my notes\n"


def sent_to(answer, target, *lines):
    """A batch of these lines to a fake server: summary, and the times at which it was asked, in seconds."""
    asked = []

    async def main():
        def timed(request):
            asked.append(asyncio.get_running_loop().time())
            return answer(request, len(asked))

        async with httpx.AsyncClient(transport=httpx.MockTransport(timed), base_url="http://x") as client:
            return await run_batch(client, list(lines), target, 1), asked

    return main()


ONE = Line(1, "a", "/v1/completions", {})
FINE = {"json": {"ok": True}}


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "8"}, 8, 12),
        ({"Retry-After": "9", "Retry-After-Ms": "2000"}, 2, 3),
        ({"Retry-After": "100000"}, 60, 60),
        ({"Retry-After": "soon"}, 0.25, 1.0),
        ({}, 0.25, 1.0),
    ],
)
def test_a_full_queue_is_waited_for_as_the_server_advises(instantly, tmp_path, headers, least, most):
    def answer(request, count):
        return httpx.Response(429, headers=headers, json={}) if count < 3 else httpx.Response(200, **FINE)

    summary, asked = instantly(sent_to(answer, tmp_path / "out.jsonl", ONE))
    assert (summary.succeeded, len(asked)) == (1, 3)
    for before, after in itertools.pairwise(asked):
        assert least <= after - before <= most


def test_a_server_that_leaves_is_waited_for_but_not_for_ever(instantly, tmp_path):
    def answer(request, count):
        return httpx.Response(503, headers={"Retry-After": "50"}, json={"error": {}})

    summary, asked = instantly(sent_to(answer, tmp_path / "out.jsonl", ONE))
    assert (summary.failed, results(tmp_path / "out.jsonl")["a"]["response"]["status_code"]) == (1, 503)
    assert 3600 - 60 <= asked[-1] <= 3600


def test_a_lost_server_is_told(instantly, tmp_path):
    def answer(request, count):
        raise httpx.ConnectError("gone")

    summary, asked = instantly(sent_to(answer, tmp_path / "out.jsonl", ONE))
    assert (summary.failed, len(asked)) == (1, 5)
    assert results(tmp_path / "out.jsonl")["a"]["error"] == {
        "code": "connection_error",
        "message": "ConnectError: gone",
    }
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert all(0.25 * 2**index <= gap <= 0.5 * 2**index for index, gap in enumerate(gaps))


def test_advice():
    now = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT
    assert advised_wait({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, now) == 30
    assert advised_wait({"retry-after": "Wed, 21 Oct 2015 07:00:00 GMT"}, now) == 0
    assert advised_wait({"retry-after": "1.5"}) == 1.5
    for nonsense in ("-1", "", "\u0661", "1.2.3", "inf", "Wed"):
        assert advised_wait({"retry-after": nonsense}) is None


@given(st.lists(st.none() | st.floats(0, 1e9), max_size=50), st.integers(0, 99))
def test_waits_are_bounded(advice, seed):
    backoff = Backoff(first=1.0, longest=20.0, patience=300.0, generator=random.Random(seed))
    waits = [backoff.next(advised) for advised in advice]
    taken = [wait for wait in waits if wait is not None]
    assert sum(taken) <= 300
    assert all(wait <= 20 for wait in taken)
    assert all(wait >= min(20, advised or 0) for wait, advised in zip(waits, advice, strict=True) if wait is not None)


@pytest.fixture
def quire():
    """Runs the program."""
    return lambda *arguments: CliRunner().invoke(app, ["batch", *map(str, arguments)], prog_name="quire")


def test_the_command_with_an_engine_of_its_own(quire, source, tmp_path):
    target = tmp_path / "out.jsonl"
    result = quire(source, target, "--num-kv-blocks", "200", "--concurrency", "3")
    assert result.exit_code == 0, result.output
    assert "3 answered, 9 failed, 0 had an answer already" in result.stderr
    assert results(target)["a"]["response"]["body"]["choices"][0]["message"]["content"] == "72"


def test_the_command_with_a_running_server(quire, server, source, tmp_path):
    result = quire(source, tmp_path / "out.jsonl", "--url", f"{server}/v1")
    assert result.exit_code == 0, result.output
    assert "3 answered" in result.stderr
    lost = quire(source, tmp_path / "other.jsonl", "--url", "http://127.0.0.1:9")
    assert (lost.exit_code, "quire serve" in lost.stderr) == (1, True)
    assert quire(source, tmp_path / "other.jsonl", "--url", "http://127.0.0.1:9x").exit_code == 2
    assert not (tmp_path / "other.jsonl").exists()
    both = quire(source, tmp_path / "other.jsonl", "--url", server, "--dtype", "float32")
    assert (both.exit_code, "no effect" in both.stderr) == (2, True)
    missing = quire(tmp_path / "none.jsonl", tmp_path / "other.jsonl", "--url", server)
    assert (missing.exit_code, "cannot read" in missing.stderr) == (2, True)


def test_lines_that_break_other_programs(server, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        "[" * 200_000,
        '{"custom_id": "\\ud800"}',
        '{"custom_id": "nan", "url": "/v1/completions", "body": {"seed": NaN}}',
    ]
    fine = json.dumps(request_line("line-1", "What\u2028is\u0085this?"), ensure_ascii=False)
    source.write_text("\n".join([fine, *bodies]), encoding="utf-8")
    summary = run(server, source, target)
    assert (summary.succeeded, summary.failed) == (1, 3)
    assert [bool(result["error"]) for result in results(target).values()].count(True) == 3
    assert results(target)["line-1"]["response"]["status_code"] == 200


def test_what_no_server_answered_is_tried_again(tmp_path):
    target, lines = tmp_path / "out.jsonl", [Line(1, "a", "/v1/completions", {}), Line(2, "b", "/v1/completions", {})]
    answers = [httpx.Response(502, text="<html>"), httpx.Response(503, json={"error": {}})]

    async def main(transport):
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await run_batch(client, lines, target, 1)

    first = asyncio.run(main(httpx.MockTransport(lambda request: answers.pop(0))))
    assert (first.succeeded, first.failed) == (0, 2)
    assert results(target)["a"]["error"]["code"] == "connection_error"
    second = asyncio.run(main(httpx.MockTransport(lambda request: httpx.Response(200, json={"ok": 1}))))
    assert (second.succeeded, second.skipped) == (2, 0)
    assert len(target.read_text().splitlines()) == 2
