"""What Prometheus is told: names, counts, and what stands at the moment."""

import re
import time

import pytest
from quire.plugin import MetricsInit
from quire.testing.metrics_sink import MetricsSinkConformance, step_stats
from quire_server.metrics import PrometheusSink

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
NAMES = """
admission_rejections_total cache_config_info e2e_request_latency_seconds generation_tokens_total
inter_token_latency_seconds iteration_tokens_total kv_cache_usage_perc num_preemptions_total num_requests_running
num_requests_waiting prefix_cache_hits_total prefix_cache_queries_total prompt_tokens_total
request_decode_time_seconds request_generation_tokens request_prefill_time_seconds request_prompt_tokens
request_queue_time_seconds request_success_total request_time_per_output_token_seconds time_to_first_token_seconds
"""
"""Dashboards are built on these names: one that goes, or changes, breaks somebody's."""


class TestPrometheusSink(MetricsSinkConformance):
    @pytest.fixture
    def sink_class(self):
        return PrometheusSink


def value(text, name):
    return float(re.search(rf"^quire:{name}(?:\{{.*\}})? (\S+)", text, re.MULTILINE)[1])


def test_the_names(http):
    http.post("/v1/chat/completions", json=HELLO)
    found = set(re.findall(r"^# TYPE quire:(\S+)", http.get("/metrics").text, re.MULTILINE))
    assert {name for name in found if not name.endswith("_created")} == set(NAMES.split())


def test_they_count(http):
    names = (
        "generation_tokens_total",
        "e2e_request_latency_seconds_count",
        "inter_token_latency_seconds_count",
        "prompt_tokens_total",
    )
    before = http.get("/metrics").text
    usage = http.post("/v1/chat/completions", json=HELLO | {"n": 2, "max_tokens": 5, "ignore_eos": True}).json()[
        "usage"
    ]
    after = http.get("/metrics").text
    tokens, requests, gaps, prompt = (value(after, name) - value(before, name) for name in names)
    assert (tokens, requests, gaps) == (usage["completion_tokens"], 2, 2 * 4) == (10, 2, 8)
    assert prompt >= usage["prompt_tokens"]
    assert value(after, "inter_token_latency_seconds_sum") > value(before, "inter_token_latency_seconds_sum")
    assert value(after, "cache_config_info") == 1


def test_a_client_that_goes_is_not_counted_as_running(http):
    """No step follows its end, so that nothing but a look at the queue can tell."""
    body = {"prompt": "go on", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # held: to let go of it is to go
        next(lines)
        during = http.get("/metrics").text
        assert value(during, "num_requests_running") == 1
        assert value(during, "kv_cache_usage_perc") > 0
    deadline = time.monotonic() + 5
    while value(http.get("/metrics").text, "num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    after = http.get("/metrics").text
    assert value(after, "num_requests_running") == value(after, "kv_cache_usage_perc") == 0


def test_counters_go_on_when_the_engines_process_was_replaced():
    sink = PrometheusSink(MetricsInit("m"))
    for total in (100, 160, 30, 50):
        sink.record_step(step_stats(0, prefix_query_tokens=total))
    assert value(sink.render().decode(), "prefix_cache_queries_total") == 160 + 50


def test_equal_gaps_are_counted_at_once():
    sink = PrometheusSink(MetricsInit("m"))
    sink.record_step(step_stats(0, token_gaps=((0.005, 64), (0.007, 1), (1000.0, 2))))
    text = sink.render().decode()
    buckets = dict(re.findall(r'^quire:inter_token_latency_seconds_bucket\{le="(.*?)".*\} (\S+)', text, re.MULTILINE))
    assert [float(buckets[bound]) for bound in ("0.0025", "0.005", "0.01", "300.0", "+Inf")] == [0, 64, 65, 65, 67]
    assert value(text, "inter_token_latency_seconds_sum") == pytest.approx(64 * 0.005 + 0.007 + 2000)
