import json
import threading

import pytest
from quire.plugin import MetricsInit, RequestStats
from quire.testing.metrics_sink import MetricsSinkConformance, step_stats
from quire_json_lines import sink as module
from quire_json_lines.sink import JsonLinesOptions, JsonLinesSink

REQUEST = RequestStats("a", "stop", 5, 4, 7, 2, 0.01, None, 0.5)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestJsonLines(MetricsSinkConformance):
    @pytest.fixture
    def sink_class(self):
        return JsonLinesSink


def test_lines_are_appended(tmp_path):
    for _ in range(2):
        sink = JsonLinesSink(MetricsInit("m", JsonLinesOptions(path=tmp_path / "out.jsonl", steps=True)))
        sink.record_step(step_stats(3))
        sink.record_request(REQUEST)
        sink.close()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "request"] * 2
    assert lines[0]["step_id"] == 3
    assert (lines[1]["model"], lines[1]["first_token_s"], lines[1]["num_output_tokens"]) == ("m", None, 7)
    assert all(line["time"] > 1e9 for line in lines)


def test_steps_are_left_out_by_default():
    sink = JsonLinesSink(MetricsInit("m"))
    sink.record_step(step_stats(0))
    sink.close()
    with open("quire-metrics.jsonl", encoding="utf-8") as file:
        assert file.read() == ""


def test_a_slow_disk_holds_nothing_up(tmp_path, monkeypatch):
    """What does not fit into the queue is counted."""
    gate = threading.Event()

    class Slow(JsonLinesSink):
        def _write(self):
            gate.wait(10)
            super()._write()

    monkeypatch.setattr(module, "QUEUED", 2)
    sink = Slow(MetricsInit("m", JsonLinesOptions(path=tmp_path / "out.jsonl")))
    for _ in range(5):
        sink.record_request(REQUEST)
    gate.set()
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["request", "request", "dropped"]
    assert lines[-1]["count"] == 3


def test_a_path_that_cannot_be_written_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        JsonLinesSink(MetricsInit("m", JsonLinesOptions(path=tmp_path / "missing" / "out.jsonl")))
