"""Prometheus metrics. Names end as vLLM's do, so that dashboards move over; they are part of the interface."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from quire.plugin import MetricsInit, MetricsSink, RequestStats, StepStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = tuple(float(2**power) for power in range(18))


class PrometheusSink(MetricsSink):
    """Counts in a registry of its own."""

    def __init__(self, init: MetricsInit) -> None:
        super().__init__(init)
        self.registry = CollectorRegistry()
        self._last: StepStats | None = None
        gauge, counter = self._gauge, self._counter
        self._running = gauge("num_requests_running", "Requests in the batch.")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue.")
        self._usage = gauge("kv_cache_usage_perc", "Share of the KV pool that is owned, 0 to 1.")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found there.")
        self._preemptions = counter("num_preemptions", "Requests that gave up their blocks for others.")
        self._prompt = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._ended = Counter(
            "quire:request_success", "Requests ended.", ("model_name", "finished_reason"), registry=self.registry
        )
        self._iteration = self._histogram("iteration_tokens_total", "Tokens per step.", TOKENS)
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Mean per further token.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to end.", SECONDS)
        self._queued = self._histogram("request_queue_time_seconds", "Arrival to first step.", SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to end.", SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self._outputs = self._histogram("request_generation_tokens", "Output tokens per request.", TOKENS)

    def record_step(self, stats: StepStats) -> None:
        last = self._last
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._usage.set(stats.kv_used_blocks / max(1, stats.kv_total_blocks))
        self._queries.inc(stats.prefix_query_tokens - (last.prefix_query_tokens if last else 0))
        self._hits.inc(stats.prefix_hit_tokens - (last.prefix_hit_tokens if last else 0))
        self._preemptions.inc(stats.num_preemptions - (last.num_preemptions if last else 0))
        self._generated.inc(stats.num_sampled)
        self._iteration.observe(stats.num_tokens)
        self._last = stats

    def record_request(self, stats: RequestStats) -> None:
        self._ended.labels(self.init.model, stats.finish_reason).inc()
        self._prompt.inc(stats.num_prompt_tokens)
        self._prompts.observe(stats.num_prompt_tokens)
        self._outputs.observe(stats.num_output_tokens)
        self._whole.observe(stats.total_s)
        if stats.queue_s is not None:
            self._queued.observe(stats.queue_s)
        if stats.first_token_s is None:
            return
        self._first.observe(stats.first_token_s)
        self._prefill.observe(stats.first_token_s - (stats.queue_s or 0.0))
        self._decode.observe(stats.total_s - stats.first_token_s)
        if stats.num_output_tokens > 1:
            self._per_token.observe((stats.total_s - stats.first_token_s) / (stats.num_output_tokens - 1))

    def watch_rejections(self, count: Callable[[], int]) -> None:
        """Report what admission has refused."""
        gauge = Gauge("quire:admission_rejections", "Requests refused with 429.", registry=self.registry)
        gauge.set_function(count)

    def set_cache_info(self, num_blocks: int, block_size: int) -> None:
        """Tell the KV pool's shape."""
        labels = ("num_blocks", "block_size")
        gauge = Gauge("quire:cache_config_info", "The KV pool.", labels, registry=self.registry)
        gauge.labels(num_blocks, block_size).set(1)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"quire:{name}", text, ("model_name",), registry=self.registry).labels(self.init.model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"quire:{name}", text, ("model_name",), registry=self.registry).labels(self.init.model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"quire:{name}", text, ("model_name",), registry=self.registry, buckets=buckets)
        return metric.labels(self.init.model)
