"""Prometheus metrics. Names end as vLLM's do, so that dashboards move over; they are part of the interface."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from quire import AsyncLLM
from quire.plugin import MetricsInit, MetricsSink, RequestStats, StepStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = tuple(float(2**power) for power in range(18))


class PrometheusSink(MetricsSink):
    """Counts in a registry of its own."""

    def __init__(self, init: MetricsInit) -> None:
        super().__init__(init)
        self.registry = CollectorRegistry()
        self._last: StepStats | None = None
        counter = self._counter
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
        self._gaps = _TokenGaps(init.model)
        self.registry.register(self._gaps)

    def record_step(self, stats: StepStats) -> None:
        last, self._last = self._last, stats
        self._queries.inc(_grown(stats.prefix_query_tokens, last.prefix_query_tokens if last else 0))
        self._hits.inc(_grown(stats.prefix_hit_tokens, last.prefix_hit_tokens if last else 0))
        self._preemptions.inc(_grown(stats.num_preemptions, last.num_preemptions if last else 0))
        self._generated.inc(stats.num_sampled)
        self._iteration.observe(stats.num_tokens)
        for seconds, count in stats.token_gaps:
            self._gaps.observe(seconds, count)

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

    def watch(self, llm: AsyncLLM, refused: Mapping[str, int]) -> None:
        """Report what stands at the moment: queues, KV pool, and how many requests were refused, by the reason."""
        engine, info = llm.engine, llm.info
        self._gauge("num_requests_running", "Requests in the batch.").set_function(
            lambda: engine.scheduler_stats().num_running
        )
        self._gauge("num_requests_waiting", "Requests in the queue.").set_function(
            lambda: engine.scheduler_stats().num_waiting
        )
        self._gauge("kv_cache_usage_perc", "Share of the KV pool that is owned, 0 to 1.").set_function(
            lambda: engine.kv_stats().used / max(1, engine.kv_stats().total)
        )
        labels = ("num_blocks", "block_size")
        pool = Gauge("quire:cache_config_info", "The KV pool.", labels, registry=self.registry)
        pool.labels(info.num_kv_blocks, info.block_size).set(1)
        self.registry.register(_Refused(self.init.model, refused))

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


def _grown(total: int, before: int) -> int:
    """What a total has grown by; one that is smaller began anew, with the engine's process."""
    return total if total < before else total - before


class _TokenGaps(Collector):
    """A histogram that takes many equal values at once: the sequences of a step have waited equally long."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        text = "Between two steps that gave a sequence tokens."
        family = HistogramMetricFamily("quire:inter_token_latency_seconds", text, labels=["model_name"])
        bounds = [*(str(bound) for bound in SECONDS), "+Inf"]
        totals = accumulate(self._counts)
        buckets = [(bound, float(total)) for bound, total in zip(bounds, totals, strict=True)]
        family.add_metric([self._model], buckets, self._sum)
        yield family


class _Refused(Collector):
    """Counts that admission keeps."""

    def __init__(self, model: str, refused: Mapping[str, int]) -> None:
        self._model, self._refused = model, refused

    def collect(self) -> Iterable[CounterMetricFamily]:
        text = "Requests that were not taken."
        family = CounterMetricFamily("quire:admission_rejections", text, labels=["model_name", "reason"])
        for reason, count in self._refused.items():
            family.add_metric([self._model, reason], count)
        yield family
