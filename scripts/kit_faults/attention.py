"""Faulty attention backends: subclasses of `cpu_ref`, and of a plain one that is right."""

from __future__ import annotations

import dataclasses

import torch
from quire.plugin import AttentionBackend, AttentionCaps, GraphSupport
from quire_cpu_ref.attention import CpuRefAttention, StepPlan

from kit_faults.fault import Fault


class SeesOneLess(CpuRefAttention):
    def plan(self, batch):
        shorter = torch.where(batch.seq_lens_host > 1, batch.seq_lens_host - 1, batch.seq_lens_host)
        return super().plan(dataclasses.replace(batch, seq_lens_host=shorter))


class OtherLayer(CpuRefAttention):
    """Serves a layer whose facts are a little different."""

    def change(self, layer):
        return layer

    def __init__(self, init):
        super().__init__(dataclasses.replace(init, layers=tuple(map(self.change, init.layers))))

    def forward(self, layer, *rest):
        super().forward(self.change(layer), *rest)


class IgnoresWindow(OtherLayer):
    def change(self, layer):
        return dataclasses.replace(layer, sliding_window=None)


class WindowOffByOne(OtherLayer):
    def change(self, layer):
        return dataclasses.replace(layer, sliding_window=layer.sliding_window and layer.sliding_window + 1)


class IgnoresSoftcap(OtherLayer):
    def change(self, layer):
        return dataclasses.replace(layer, logit_softcap=None)


class IgnoresSinks(OtherLayer):
    """Declares a feature that it does not have."""

    def change(self, layer):
        return dataclasses.replace(layer, sinks=None)


class WrongScale(OtherLayer):
    def change(self, layer):
        return dataclasses.replace(layer, scale=layer.scale * 1.01)


class WrongSlot(CpuRefAttention):
    def write_kv(self, layer, k, v, kv, batch):
        super().write_kv(layer, k, v, kv, dataclasses.replace(batch, slot_mapping=batch.slot_mapping ^ 1))


class WritesBeside(CpuRefAttention):
    """Rounds a write up to whole pairs of slots."""

    def write_kv(self, layer, k, v, kv, batch):
        super().write_kv(layer, k, v, kv, batch)
        beside = batch.slot_mapping[-1] + 1
        kv[0].view(-1, *kv[0].shape[2:])[beside] = k[-1]


class IgnoresCacheScales(CpuRefAttention):
    def write_kv(self, layer, k, v, kv, batch):
        super().write_kv(dataclasses.replace(layer, k_scale=1.0, v_scale=1.0), k, v, kv, batch)

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        super().forward(dataclasses.replace(layer, k_scale=1.0, v_scale=1.0), q, k, v, kv, batch, plan, out)


class WritesInForward(CpuRefAttention):
    def forward(self, layer, q, k, v, kv, batch, plan, out):
        super().forward(layer, q, k, v, kv, batch, plan, out)
        kv[0][-1] = 0.0


class MixesGroups(CpuRefAttention):
    def forward(self, layer, q, k, v, kv, batch, plan, out):
        result = torch.empty_like(out)
        super().forward(layer, q.flip(1), k, v, kv, batch, plan, result)
        out.copy_(result.flip(1))


class LeavesPadding(CpuRefAttention):
    def forward(self, layer, q, k, v, kv, batch, plan, out):
        rest = out[int(batch.query_start_loc_host[-1]) :].clone()
        super().forward(layer, q, k, v, kv, batch, plan, out)
        out[int(batch.query_start_loc_host[-1]) :] = rest


class FalselyDeterministic(CpuRefAttention):
    """Scales the queries where there are few, and the scores elsewhere: other bits on any processor."""

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        if batch.num_tokens < 8:
            layer, q = dataclasses.replace(layer, scale=1.0), q * layer.scale
        super().forward(layer, q, k, v, kv, batch, plan, out)


class KeepsStale(CpuRefAttention):
    """Leaves what other requests wrote behind a row's end to the mask, which cannot hide a NaN."""

    def plan(self, batch):
        plan = super().plan(batch)
        if isinstance(plan, StepPlan):
            for shape, groups in plan.groups.items():
                plan.groups[shape] = tuple(dataclasses.replace(group, stale=group.stale[:0]) for group in groups)
        return plan


class HalfPrecision(CpuRefAttention):
    """Computes float32 in bfloat16, which is declared and not so."""

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        super().forward(layer, q.bfloat16().to(q.dtype), k, v, kv, batch, plan, out)


class ForgetsNormOffset(CpuRefAttention):
    """A fused path that knows no offset of norms."""

    def prepare_qkv(self, step):
        norms = [norm and dataclasses.replace(norm, weight_offset=0.0) for norm in (step.q_norm, step.k_norm)]
        return super().prepare_qkv(dataclasses.replace(step, q_norm=norms[0], k_norm=norms[1]))


class Plain(AttentionBackend):
    """Right, one row at a time; its plan is the context lengths in a tensor of its own."""

    caps = AttentionCaps(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        features=frozenset({"causal", "sliding_window", "v_head_dim"}),
        graph=GraphSupport.UNIFORM,
    )

    def __init__(self, init):
        super().__init__(init)
        self.lengths = torch.zeros(init.max_num_reqs, dtype=torch.int32)

    def plan(self, batch):
        self.lengths[: batch.num_reqs].copy_(batch.seq_lens)
        return self.lengths[: batch.num_reqs]

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        starts, group = batch.query_start_loc.tolist(), layer.num_heads // layer.num_kv_heads
        out.zero_()
        for row, length in enumerate(plan.tolist()):
            first, last, at = starts[row], starts[row + 1], torch.arange(length)
            slots = self.slots(batch, row, at)
            keys, values = (cache.flatten(0, 1)[slots].repeat_interleave(group, 1) for cache in kv)
            scores = torch.einsum("qhd,khd->hqk", q[first:last], keys) * layer.scale
            query = torch.arange(length - (last - first), length)[:, None]
            weights = self.weights(scores.masked_fill(self.hidden(layer, at, query), float("-inf")))
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, values)

    def slots(self, batch, row, at):
        return batch.block_table[row, at // batch.block_size].long() * batch.block_size + at % batch.block_size

    def hidden(self, layer, at, query):
        window = layer.sliding_window
        return (at > query) if window is None else (at > query) | (at <= query - window)

    def weights(self, scores):
        return scores.softmax(-1)


class NotCausal(Plain):
    def hidden(self, layer, at, query):
        return torch.zeros_like(at > query)


class TakesBlocksInOrder(Plain):
    """A request's blocks stand one behind the other only as long as the pool is fresh."""

    def slots(self, batch, row, at):
        return batch.block_table[row, 0].long() * batch.block_size + at


class OneBlockSize(Plain):
    def slots(self, batch, row, at):
        return super().slots(dataclasses.replace(batch, block_size=16), row, at)


class AssumesVSize(Plain):
    """Finds a value head where it would stand if it were as long as a key's."""

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        flat, size = kv[1].flatten(2), layer.v_head_dim
        heads = [flat.roll(-head * layer.head_dim, -1)[..., :size] for head in range(layer.num_kv_heads)]
        super().forward(layer, q, k, v, (kv[0], torch.stack(heads, 2)), batch, plan, out)


class AllocatesPlans(Plain):
    """A new tensor in each step, where a captured graph reads the first."""

    def plan(self, batch):
        return batch.seq_lens.clone()


class PlansOnce(Plain):
    """Keeps the lengths of the first step that it saw."""

    def plan(self, batch):
        return super().plan(batch) if not self.lengths.any() else self.lengths[: batch.num_reqs]


class SharesAMaximum(Plain):
    """Subtracts one maximum of the whole step, so that a loud request flattens another's weights."""

    def plan(self, batch):
        self.largest = 0.0
        return super().plan(batch)

    def weights(self, scores):
        self.largest = max(self.largest, float(scores.amax()))
        weights = (scores - self.largest).exp()
        return weights / weights.sum(-1, keepdim=True)


FAULTS = (
    Fault("context off by one", "attention", SeesOneLess),
    Fault("not causal", "attention", NotCausal),
    Fault("window ignored", "attention", IgnoresWindow),
    Fault("window off by one", "attention", WindowOffByOne),
    Fault("softcap ignored", "attention", IgnoresSoftcap),
    Fault("sinks declared and ignored", "attention", IgnoresSinks),
    Fault("scale off by a hundredth", "attention", WrongScale),
    Fault("query heads read other KV heads", "attention", MixesGroups),
    Fault("v size taken for the keys'", "attention", AssumesVSize),
    Fault("KV written to the wrong slot", "attention", WrongSlot),
    Fault("KV written beside its slot", "attention", WritesBeside),
    Fault("scales of 8-bit floats ignored", "attention", IgnoresCacheScales),
    Fault("forward writes KV", "attention", WritesInForward),
    Fault("padding rows left as they were", "attention", LeavesPadding),
    Fault("stale slots hidden by a mask only", "attention", KeepsStale),
    Fault("blocks taken to be neighbours", "attention", TakesBlocksInOrder),
    Fault("one block size whatever is asked", "attention", OneBlockSize),
    Fault("float32 computed in bfloat16", "attention", HalfPrecision),
    Fault("a maximum shared by all rows", "attention", SharesAMaximum),
    Fault("plan makes new tensors", "attention", AllocatesPlans),
    Fault("plan is stale", "attention", PlansOnce),
    Fault("fused norm without its offset", "attention", ForgetsNormOffset),
    Fault("falsely deterministic", "attention", FalselyDeterministic),
)
