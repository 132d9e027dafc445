"""What is decided without a GPU: whether the plugin can run, how it launches, how much it allocates."""

import json
import subprocess
import sys

import pytest
import torch
from quire.contract.attention import AttentionInit, AttentionLayer
from quire.testing.batches import make_batch
from quire_cuda_paged import probe
from quire_cuda_paged.attention import MIN_TILES, CudaPagedAttention, shape_of
from quire_cuda_paged.tuning import tuning_for

pytestmark = pytest.mark.filterwarnings("ignore:CUDA initialization")


def test_why_it_cannot_run_is_told(monkeypatch):
    assert probe.missing() is None or isinstance(probe.missing(), str)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert probe.missing() == "torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.missing() == "no CUDA device is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5; 8.0 is needed" in probe.missing()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert probe.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'quire[cuda]'" in probe.missing()


def test_listing_and_explaining_import_no_triton():
    program = (
        "import sys; from quire.cli import main; sys.argv[1:] = ['plugins', 'explain', 'attention', '--json']\n"
        "try: main()\nfinally: print('triton' in sys.modules, file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (found,) = [row for row in json.loads(answer.stdout) if row["name"] == "cuda_paged"]
    assert found["chosen"] or found["reasons"]
    assert answer.stderr.strip().endswith("False")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_gpu_has_a_launch(capability, head_dim):
    tuning = tuning_for(capability, head_dim)
    for launch in (tuning.decode, tuning.prefill):
        assert launch.block_m % 16 == launch.tile % 16 == 0
        tiles = 2 * launch.tile * head_dim * 2 * (launch.num_stages - 1)  # K and V in flight, 16 bits
        small = capability in ((8, 6), (8, 9), (12, 0))
        assert tiles + 2 * launch.block_m * head_dim <= (99 if small else 163) * 1024


def backend(rows=8, **fields):
    layer = AttentionLayer(0, 8, 2, 64, 64, 0.125, **fields)
    return CudaPagedAttention(AttentionInit(torch.device("cpu"), torch.float32, (layer,), 16, rows, 512, 64)), layer


@pytest.mark.parametrize("seed", range(5))
def test_parts_cover_every_tile_once_and_fit_the_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    made, layer = backend()
    lengths = torch.randint(0, 900, (7,), generator=generator).tolist()
    batch = make_batch([1] * 7, lengths).batch
    plan = made.plan(batch)
    assert plan.num_decodes == {shape_of(layer): 7}
    space = made._workspaces[shape_of(layer)]
    tile, chunk = space.tuning.decode.tile, int(space.chunk)
    tiles = [-(-(length + 1) // tile) for length in lengths]
    parts = space.split_start[:8].diff().tolist()
    assert chunk >= MIN_TILES
    assert [(count - 1) * chunk < needed <= count * chunk for count, needed in zip(parts, tiles, strict=True)] == [
        True
    ] * 7
    assert int(space.split_start[7]) <= 7 + space.target


def test_decodes_are_told_from_prefills():
    made, layer = backend()
    shape = shape_of(layer)
    most = made._workspaces[shape].decode_queries
    assert most == 4
    for query_lens, expected in (([1, 1, 4], 3), ([1, 5, 1], 1), ([9], 0), ([1, 4, 0], 3)):
        assert made.plan(make_batch(query_lens, [20] * len(query_lens)).batch).num_decodes[shape] == expected
