"""What a plugin hands to the host: `Provider`, and the table of extension points it may name.

A provider is data. Its `target` is imported only when it is selected, its `probe` is a cheap
callable that says why this machine cannot run it, so listing plugins never imports a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Tier = Literal["stable", "provisional", "experimental"]


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation of one extension point.

    Attributes:
        point: name of the extension point, a key of `POINTS`.
        name: how users select it; unique per point, else usable only as `plugin:name`.
        target: `"package.module:attribute"`, imported only when selected.
        api: version of the point's contract that the target was written against.
        priority: `auto` takes the highest that fits.
        devices: device types it can run on; empty means any.
        probe: `"package.module:function"` returning None, or the reason why it cannot run here.
        options: `"package.module:Model"`, the plugin's own pydantic model (`extra="forbid"`).
        summary: one line for `quire plugins list`.
    """

    point: str
    name: str
    target: str
    api: int
    priority: int = 0
    devices: frozenset[str] = frozenset()
    probe: str | None = None
    options: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """An extension point: what is implemented, which API versions the host serves, how firm it is.

    Attributes:
        name: the point's name.
        base: `"module:Class"` that targets derive from (or whose instance they are).
        oldest: oldest API version that this host still serves.
        current: newest API version.
        tier: `stable` changes only with a new version and two releases of warning.
        summary: one line that says what a provider decides.
        adapters: for an older version that is still served, `"module:function"` that turns a target of it
            into one of the next; a version without one only lacks what was added since.
    """

    name: str
    base: str
    oldest: int
    current: int
    tier: Tier
    summary: str
    adapters: Mapping[int, str] = field(default_factory=dict)


def _table(*points: Point) -> Mapping[str, Point]:
    return MappingProxyType({point.name: point for point in points})


POINTS: Mapping[str, Point] = _table(
    Point("attention", "quire.plugin:AttentionBackend", 1, 1, "stable", "paged attention over the KV cache"),
    Point("kv_allocator", "quire.plugin:KVAllocator", 1, 1, "stable", "which blocks hold which tokens"),
    Point("scheduler", "quire.plugin:Scheduler", 1, 1, "stable", "who runs in a step, with how many tokens"),
    Point("scheduler_policy", "quire.plugin:SchedulerPolicy", 1, 1, "stable", "order, admission and victims"),
    Point("sampler", "quire.plugin:Sampler", 1, 1, "stable", "logits to token ids"),
    Point("logits_processor", "quire.plugin:LogitsProcessor", 1, 1, "stable", "edits logits before sampling"),
    Point("quantization", "quire.plugin:QuantMethod", 1, 1, "stable", "linear layers with quantized weights"),
    Point("op", "quire.plugin:OpSet", 1, 1, "stable", "norms, rotary embedding, activations, linears, experts"),
    Point("model", "quire.plugin:ModelSpec", 1, 1, "stable", "an architecture: modules and weight names"),
    Point("output_parser", "quire.plugin:OutputParser", 1, 1, "stable", "reasoning and tool calls in the text"),
    Point("metrics_sink", "quire.plugin:MetricsSink", 1, 1, "stable", "receives step and request statistics"),
    Point("device", "quire.plugin:Device", 1, 1, "provisional", "memory, dtypes, streams and graphs of a device"),
    Point("executor", "quire.plugin:Executor", 1, 1, "provisional", "where the model's steps are run"),
)
