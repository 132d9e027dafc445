"""cpu_ref's attention passes the kit; `test_kit_mutants` shows that the kit kills faulty ones."""

import pytest
from quire.testing.attention import AttentionConformance
from quire_cpu_ref import tiles
from quire_cpu_ref.attention import CpuRefAttention


class TestCpuRef(AttentionConformance):
    @pytest.fixture
    def backend_class(self):
        return CpuRefAttention


def test_tiles_follow_absolute_positions():
    from quire.testing.batches import make_batch

    plan = tiles.plan_tiles(make_batch([20, 1], [10, 31]).batch, frozenset({None}))
    assert [(tile.start, tile.rows) for tile in plan.tiles] == [(0, (10, 16)), (16, (0, 14)), (16, (15, 16))]
    assert {tile.slots.numel() for tile in plan.tiles} == {64}
