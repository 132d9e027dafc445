"""What sinks and hooks are told, and that they cannot hurt the engine."""

import logging
import sys
import types
from typing import ClassVar

import pytest
from quire import LLM, SamplingParams
from quire.contract.metrics import MetricsInit, MetricsSink
from quire.contract.request import FinishReason, Request
from quire.engine import metrics as metrics_module
from quire.engine.metrics import MAX_FAILURES, LogSink, Metrics
from quire.registry import HostOptions, build_host
from quire.testing.clock import VirtualClock
from quire.testing.metrics_sink import MetricsSinkConformance, step_stats

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


PLUGIN = """
from quire.plugin import Provider, hookimpl

told = []

@hookimpl
def quire_providers():
    return [Provider("metrics_sink", "recorder", "recording_sinks:Recorder", api=1)]

@hookimpl
def quire_on_engine_start(engine):
    told.append(engine)

@hookimpl
def quire_on_step(stats):
    told.append(stats)
"""


class TestLogSink(MetricsSinkConformance):
    @pytest.fixture
    def sink_class(self):
        return LogSink


class Recorder(MetricsSink):
    seen: ClassVar[list] = []

    def record_step(self, stats):
        self.seen.append(stats)

    def record_request(self, stats):
        self.seen.append(stats)

    def close(self):
        self.seen.append("closed")


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The installed plugins and one more: a sink and two observers."""
    module = types.ModuleType("recording_sinks")
    module.Recorder = Recorder
    monkeypatch.setitem(sys.modules, "recording_sinks", module)
    monkeypatch.setattr(Recorder, "seen", [])
    plugin = tmp_path / "watcher.py"
    plugin.write_text(PLUGIN)
    yield build_host(HostOptions(files=(plugin,)))
    sys.modules.pop("watcher", None)


def test_sinks_and_hooks_see_every_step_and_request(checkpoint, host):
    llm = LLM(checkpoint("llama"), host=host, dtype="float32", num_kv_blocks=60, metrics_sinks=("recorder",))
    told = sys.modules["watcher"].told
    assert (told[0].num_kv_blocks, told[0].selected["scheduler"]) == (60, "continuous")
    prompt = list(range(3, 40))
    for _ in range(2):
        llm.generate([prompt], PARAMS, use_tqdm=False)
    steps = [item for item in Recorder.seen if hasattr(item, "step_id")]
    requests = [item for item in Recorder.seen if hasattr(item, "finish_reason")]
    assert told[1:] == steps
    assert sum(stats.num_sampled for stats in steps) == 10
    assert sum(stats.num_tokens for stats in steps) == (37 + 4) + (37 - 32 + 4)
    assert (steps[-1].prefix_hit_tokens, steps[-1].prefix_query_tokens) == (32, 72)
    assert all(stats.forward_s > 0 and stats.kv_total_blocks == 59 for stats in steps)
    gaps = [gap for stats in steps for gap in stats.token_gaps]
    assert [count for _, count in gaps] == [1] * 8
    assert all(seconds > 0 for seconds, _ in gaps)
    figures = [(r.num_prompt_tokens, r.num_cached_tokens, r.num_output_tokens) for r in requests]
    assert figures == [(37, 0, 5), (37, 32, 5)]
    assert all(0 <= r.queue_s <= r.first_token_s <= r.total_s for r in requests)
    llm.shutdown()
    assert Recorder.seen[-1] == "closed"


def test_a_sink_that_fails_is_muted_and_the_others_go_on(caplog):
    class Broken(MetricsSink):
        calls = 0

        def record_step(self, stats):
            Broken.calls += 1
            raise ValueError("broken")

    Recorder.seen = []
    metrics = Metrics([("broken", Broken(MetricsInit("m"))), ("ok", Recorder(MetricsInit("m")))], VirtualClock())
    for step_id in range(6):
        metrics.step(step_stats(step_id))
    assert (Broken.calls, len(Recorder.seen)) == (MAX_FAILURES, 6)
    assert "muted" in caplog.text


def test_times_of_a_request_that_never_ran():
    Recorder.seen = []
    clock = VirtualClock(5.0)
    metrics = Metrics([("r", Recorder(MetricsInit("m")))], clock)
    request = Request("a", (1, 2), PARAMS, clock(), 5, finish_reason=FinishReason.ABORT)
    clock.advance(2.0)
    metrics.finished(request)
    (stats,) = Recorder.seen
    assert (stats.queue_s, stats.first_token_s, stats.total_s, stats.finish_reason) == (None, None, 2.0, "abort")


def test_the_log_line(caplog, monkeypatch):
    clock = VirtualClock()
    monkeypatch.setattr(metrics_module.time, "monotonic", clock)
    sink = LogSink(MetricsInit("tiny"))
    with caplog.at_level(logging.INFO):
        sink.record_step(step_stats(0))
        assert caplog.text == ""
        clock.advance(metrics_module.LOG_INTERVAL + 2)
        sink.record_step(step_stats(1))
    assert "tiny: 2.0 tokens/s computed" in caplog.text
    assert "3 running, 1 waiting" in caplog.text
