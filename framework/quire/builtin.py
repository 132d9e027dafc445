"""The core's own providers, offered through the same hook as any plugin's."""

from __future__ import annotations

from collections.abc import Iterable

from quire.contract.provider import Provider
from quire.hooks import hookimpl

FAMILIES = {
    "llama": "Llama 2 and 3.x",
    "mistral": "Mistral",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text",
    "phi3": "Phi-3 and Phi-4",
}


@hookimpl
def quire_providers() -> Iterable[Provider]:
    """Everything that needs no particular device."""
    yield from _engine_parts()
    yield from _sampling_parts()
    for name, summary in FAMILIES.items():
        yield Provider("model", name, f"quire.models.{name}:SPEC", api=1, summary=summary)
    yield Provider(
        "model",
        "transformers",
        "quire.models.bridge:SPEC",
        api=1,
        priority=-10,
        summary="any other decoder that transformers can run",
    )


def _engine_parts() -> Iterable[Provider]:
    yield Provider(
        "kv_allocator",
        "paged",
        "quire.kv.paged:PagedAllocator",
        api=1,
        priority=10,
        summary="full blocks shared by hash",
    )
    yield Provider(
        "kv_allocator",
        "radix",
        "quire.kv.radix:RadixAllocator",
        api=1,
        options="quire.kv.radix:RadixOptions",
        summary="radix tree, shares parts of blocks too",
    )
    yield Provider(
        "scheduler",
        "continuous",
        "quire.scheduling.continuous:ContinuousScheduler",
        api=1,
        summary="continuous batching, chunked prefill",
    )
    yield Provider(
        "scheduler_policy",
        "fcfs",
        "quire.scheduling.policies:FcfsPolicy",
        api=1,
        priority=10,
        summary="first come, first served",
    )
    yield Provider(
        "scheduler_policy",
        "priority",
        "quire.scheduling.policies:PriorityPolicy",
        api=1,
        options="quire.scheduling.policies:PriorityOptions",
        summary="lower value first, with ageing",
    )
    yield Provider("executor", "inproc", "quire.engine.inproc:InprocExecutor", api=1, summary="the engine's process")
    yield Provider("metrics_sink", "log", "quire.engine.metrics:LogSink", api=1, summary="a line every ten seconds")


def _sampling_parts() -> Iterable[Provider]:
    yield Provider("sampler", "torch", "quire.sampling.sampler:TorchSampler", api=1, summary="plain torch")
    for name, target, summary in (
        ("token_filter", "TokenFilter", "allowed and bad tokens"),
        ("logit_bias", "LogitBias", "a constant per token"),
        ("min_tokens", "MinTokens", "no end before so many tokens"),
        ("penalties", "Penalties", "repetition, frequency, presence"),
    ):
        yield Provider("logits_processor", name, f"quire.sampling.processors:{target}", api=1, summary=summary)
    yield Provider(
        "output_parser", "qwen", "quire.parsers.qwen:QwenParser", api=1, summary="<think> and <tool_call> blocks"
    )
    yield Provider(
        "output_parser", "plain", "quire.parsers.plain:PlainParser", api=1, priority=-10, summary="all text is answer"
    )
