"""`quire bench serve`: figures from times that are known, and a real run."""

import asyncio
import itertools
import json
import statistics

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire import ConfigError
from quire.cli.app import app
from quire_server.load.figures import Trace, parse_objectives, summarize
from quire_server.load.plan import Planned, arrivals, file_prompts, planned, random_prompts
from quire_server.load.report import report_rows, told
from quire_server.load.runner import run_load
from typer.testing import CliRunner


def chunk(text, **more):
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], **more}


class Answer(httpx.AsyncByteStream):
    """Pieces of text at known times after the request; then usage and end."""

    def __init__(self, waits, end=True):
        self.waits, self.end = waits, end

    async def __aiter__(self):
        yield b": keep-alive\n\n"
        for wait in self.waits:
            await asyncio.sleep(wait)
            yield f"data: {json.dumps(chunk('x'))}\n\n".encode()
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.waits)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        await asyncio.sleep(0.25)
        yield b"data: [DONE]\n\n" * self.end


@pytest.fixture
def run(instantly):
    """Traces of requests that are answered by what `answers` gives for their index."""
    return lambda plan, answers, concurrency=None: instantly(sent(plan, answers, concurrency))


async def sent(plan, answers, concurrency):
    async def answer(request):
        found = answers(json.loads(request.content)["index"])
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, httpx.Response) else httpx.Response(200, stream=found)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        return await run_load(client, plan, concurrency)


def plan_of(*dues):
    return [Planned(due, "/v1/completions", {"index": index}) for index, due in enumerate(dues)]


def test_times_are_those_at_which_things_happened(run):
    first, second = run(plan_of(0.0, 1.5), lambda index: Answer([0.5, 0.125, 0.125] if index == 0 else [2.0]))
    assert first == Trace(0.0, 0.0, 1.0, (0.5, 0.625, 0.75), 7, 3)
    assert second == Trace(1.5, 1.5, 3.75, (3.5,), 7, 1)
    report = summarize([first, second], {})
    assert (report.spreads["ttft"].mean, report.spreads["ttft"].max) == (1.25, 2.0)
    assert (report.spreads["itl"].mean, report.spreads["tpot"].max) == (0.125, 0.125)
    assert (report.duration_s, report.output_token_rate) == (3.75, 4 / 3.75)


def test_a_slow_server_does_not_slow_the_load_down_unless_it_is_asked_to(run):
    plan = plan_of(0.0, 1.0, 2.0)
    opened = run(plan, lambda index: Answer([8.0]))
    assert [trace.sent for trace in opened] == [0.0, 1.0, 2.0]
    held = run(plan, lambda index: Answer([8.0]), concurrency=1)
    assert [trace.sent for trace in held] == [0.0, 8.25, 16.5]
    assert [trace.latencies()["ttft"] for trace in held] == [[8.0]] * 3  # from when it was sent, and how late that was:
    assert summarize(held, {}).spreads["late"].max == 14.5


def test_failures_are_told_by_kind(run):
    def answer(index):
        stream = httpx.Response(200, text='data: {"error": {"message": "no"}}\n\n')
        return [httpx.Response(429), httpx.ReadTimeout("t"), httpx.ConnectError("c"), httpx.ReadError("r"), stream,
                Answer([0.5], end=False), httpx.Response(200, text="data: <html>\n\n"), Answer([1])][index]  # fmt: skip

    report = summarize(run(plan_of(*[0.0] * 8), answer), {"e2e": 9.0})
    kinds = ["status 429", "timeout", "no connection", "connection lost", "error in the stream", "stream cut",
             "no answer of OpenAI's API"]  # fmt: skip
    assert report.errors == dict.fromkeys(kinds, 1)
    assert (report.num_requests, report.num_answered, report.num_good) == (8, 1, 1)
    lines = "\n".join(told(report))
    assert "8 sent, 1 answered, 7 failed" in lines
    assert "1 by status 429" in lines


def test_goodput_counts_what_meets_all_objectives():
    traces = [
        Trace(0, 0, 1.0, (0.1, 0.2), 1, 2),
        Trace(0, 0, 1.0, (0.3, 0.4), 1, 2),  # late first token
        Trace(0, 0, 1.0, (0.1, 0.9), 1, 2),  # slow after it
        Trace(0, 0, 2.0, (0.1, 0.2), 1, 2),  # late end
        Trace(0, 0, 0.1, (), 1, 0, "timeout"),
    ]
    objectives = parse_objectives(["ttft=200", "tpot=150", "e2e=1500"])
    assert objectives == {"ttft": 0.2, "tpot": 0.15, "e2e": 1.5}
    report = summarize(traces, objectives)
    assert (report.num_good, report.goodput) == (1, 0.5)
    assert summarize(traces, {}).num_good == 4
    assert "20.0% of all" in "\n".join(told(report))
    assert "ttft <= 200 ms" in "\n".join(told(report))


@pytest.mark.parametrize("text", ["ttft", "ttft=0", "ttft=nan", "ttft=inf", "itl=5", "=5", "ttft=fast"])
def test_objectives_that_are_not_understood(text):
    with pytest.raises(ConfigError, match="NAME=MILLISECONDS"):
        parse_objectives([text])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles(ends):
    spread = summarize([Trace(0.0, 0.0, end) for end in ends], {}).spreads["e2e"]
    ordered = sorted(ends)
    assert spread.p50 == pytest.approx(statistics.median(ends))
    assert spread.mean == pytest.approx(statistics.fmean(ends))
    assert ordered[0] <= spread.p50 <= spread.p90 * (1 + 1e-12)
    assert spread.p90 <= spread.p99 * (1 + 1e-12)
    assert spread.max == ordered[-1]
    below = sum(end <= spread.p90 * (1 + 1e-12) for end in ends)
    assert below >= int(0.9 * (len(ends) - 1)) + 1


def test_a_load_of_nothing_has_figures():
    report = summarize([Trace(0, 0, 0, error="timeout")], {"ttft": 1.0})
    assert (report.request_rate, report.goodput, report.spreads) == (0.0, 0.0, {})
    assert report_rows(report) == []


def test_arrivals():
    def times(*given, count=4000):
        return list(itertools.islice(arrivals(*given), count))

    assert times(4.0, "constant", 0, count=4) == [0.0, 0.25, 0.5, 0.75]
    assert times(float("inf"), "poisson", 0, count=3) == [0.0, 0.0, 0.0]
    drawn = times(5.0, "poisson", 1)
    assert drawn == times(5.0, "poisson", 1)
    assert drawn != times(5.0, "poisson", 2)
    gaps = [after - before for before, after in itertools.pairwise(drawn)]
    # An exponential distribution's mean and deviation are the same; both within five standard errors.
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=5 / len(gaps) ** 0.5)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=10 / len(gaps) ** 0.5)


def test_prompts(tmp_path):
    one, other = itertools.islice(random_prompts([5, 6, 7, 8], 40, seed=3), 2)
    assert len(one["prompt"]) == 40
    assert set(one["prompt"]) <= {5, 6, 7, 8}
    assert one["prompt"] != other["prompt"]
    assert next(random_prompts([5, 6, 7, 8], 40, seed=3)) == one
    lines, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one\n\ntwo\u2028half\n", encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    objects.write_text(json.dumps({"prompt": "p"}) + "\n" + json.dumps(chat))
    bodies = [request.body for request in planned(file_prompts(lines), itertools.repeat(0.0), 3, model="m")]
    assert [body["prompt"] for body in bodies] == ["one", "two\u2028half", "one"]
    found = planned(file_prompts(objects), itertools.repeat(0.0), 2, model="m", max_tokens=9)
    assert [request.path for request in found] == ["/v1/completions", "/v1/chat/completions"]
    assert [request.body["max_tokens"] for request in found] == [9, 2]
    for bad in ("", "{", "[1]", '{"x": 1}', '{"prompt": "a", "messages": []}'):
        objects.write_text(bad)
        with pytest.raises(ConfigError, match=r"a\.jsonl"):
            file_prompts(objects)
    with pytest.raises(ConfigError, match="cannot read"):
        file_prompts(tmp_path / "none")


@pytest.fixture
def quire(monkeypatch):
    """Runs the program."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda *arguments: CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="quire")


def test_a_real_server_under_load(quire, server, tmp_path):
    file = tmp_path / "figures.json"
    result = quire("serve", "--url", server, "--requests", "12", "--rate", "inf", "--concurrency", "5", "--input-len",
                   "20", "--output-len", "8", "--slo", "e2e=600000", "--json", file)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12 sent, 12 answered, 0 failed" in result.stdout
    assert "12/12" in result.stderr
    found = json.loads(file.read_text())
    assert found["load"]["concurrency"] == 5
    report = found["report"]
    assert (report["num_prompt_tokens"], report["num_output_tokens"], report["num_good"]) == (240, 96, 12)
    for request in found["requests"]:
        times = [request["due"], request["sent"], *request["pieces_at"], request["ended"]]
        assert times == sorted(times)
        assert 1 <= len(request["pieces_at"]) <= 8
    running = [sum(other["sent"] <= one["sent"] < other["ended"] for other in found["requests"])
               for one in found["requests"]]  # fmt: skip
    assert max(running) == 5
    table = [line for line in result.stdout.splitlines() if line.startswith(("time to first", "MS"))]
    assert table[0].split() == ["MS", "MEAN", "P50", "P90", "P99", "MAX"]
    assert float(table[1].split()[-1]) == pytest.approx(1000 * report["spreads"]["ttft"]["max"], abs=0.006)


def test_prompts_of_a_file(quire, server, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "What is 27+45?"}]}))
    result = quire("serve", "--url", server, "--requests", "3", "--rate", "200", "--prompts", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    assert "3 answered" in result.stdout


def test_what_cannot_be_measured(quire, server, serve):
    assert quire("serve", "--url", server, "--rate", "0").exit_code == 2
    lost = quire("serve", "--url", "http://127.0.0.1:9")
    assert (lost.exit_code, "no server answers" in lost.stderr) == (1, True)
    refused = quire("serve", "--url", server, "--output-len", "100000", "--requests", "2", "--rate", "inf")
    assert (refused.exit_code, "2 by status 400" in refused.stdout) == (1, True)
    assert "no request was answered" in refused.stderr


def test_the_engines_own_benchmark_is_still_there(quire):
    assert "--batch" in quire("--help").stdout
    assert "--url" in quire("serve", "--help").stdout
    assert quire("serve", "--help").stdout.split()[:4] == ["Usage:", "quire", "bench", "serve"]
