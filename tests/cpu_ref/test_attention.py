"""cpu_ref's attention passes the kit, and the kit kills backends with plausible bugs."""

import dataclasses

import pytest
import torch
from quire.testing.attention import AttentionConformance
from quire.testing.attention_problems import CASES, LAYERS, Problem, make_layer
from quire_cpu_ref import attention, tiles
from quire_cpu_ref.attention import CpuRefAttention


class TestCpuRef(AttentionConformance):
    @pytest.fixture
    def backend_class(self):
        return CpuRefAttention


class SeesOneLess(CpuRefAttention):
    def plan(self, batch):
        shorter = torch.where(batch.seq_lens_host > 1, batch.seq_lens_host - 1, batch.seq_lens_host)
        return super().plan(dataclasses.replace(batch, seq_lens_host=shorter))


class OtherLayer(CpuRefAttention):
    """Serves a layer whose facts are a little different."""

    def change(self, layer):
        raise NotImplementedError

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
    def change(self, layer):
        return dataclasses.replace(layer, sinks=None)


class WrongScale(OtherLayer):
    def change(self, layer):
        return dataclasses.replace(layer, scale=layer.scale * 1.01)


class WrongSlot(CpuRefAttention):
    def write_kv(self, layer, k, v, kv, batch):
        super().write_kv(layer, k, v, kv, dataclasses.replace(batch, slot_mapping=batch.slot_mapping ^ 1))


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


MUTANTS = [
    SeesOneLess, IgnoresWindow, WindowOffByOne, IgnoresSoftcap, IgnoresSinks, WrongSlot, WritesInForward,
    MixesGroups, LeavesPadding, WrongScale, FalselyDeterministic,
]  # fmt: skip


def attack(backend_class):
    """Run the kit's cases until one fails."""
    kit = AttentionConformance()
    for layer in LAYERS:
        for case in CASES.values():
            kit.check(backend_class, Problem.make(make_layer(layer), case, torch.float32))
    kit.test_padding(backend_class, "mixed")
    kit.test_deterministic_over_batches_and_chunks(backend_class, "gqa", torch.float32)


def test_the_kit_accepts_the_original():
    attack(CpuRefAttention)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_kit_kills(mutant):
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        attack(mutant)


class KeepsStale(CpuRefAttention):
    """Leaves what other requests wrote behind a row's end to the mask, which cannot hide a NaN."""

    def plan(self, batch):
        plan = super().plan(batch)
        if isinstance(plan, attention.StepPlan):
            for shape, groups in plan.groups.items():
                plan.groups[shape] = tuple(dataclasses.replace(group, stale=group.stale[:0]) for group in groups)
        return plan


def test_stale_nan_cannot_leak():
    with pytest.raises(AssertionError, match="finite"):
        attack(KeepsStale)


def test_tiles_follow_absolute_positions():
    from quire.testing.batches import make_batch

    plan = tiles.plan_tiles(make_batch([20, 1], [10, 31]).batch, frozenset({None}))
    assert [(tile.start, tile.rows) for tile in plan.tiles] == [(0, (10, 16)), (16, (0, 14)), (16, (15, 16))]
    assert {tile.slots.numel() for tile in plan.tiles} == {64}
