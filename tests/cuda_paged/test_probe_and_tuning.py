"""What is decided without a GPU: whether the plugin can run, how it launches, how much it allocates."""

import json
import subprocess
import sys

import pytest
import torch
from quire.contract.attention import AttentionInit, AttentionLayer
from quire.testing.batches import make_batch
from quire_cuda_paged import probe
from quire_cuda_paged.attention import MIN_TILES, CudaPagedAttention, _grid, shape_of
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


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("seed", range(3))
def test_parts_cover_every_tile_once_and_fit_the_grid(seed, window):
    """Of a row's tiles, those that its queries see something of; what lies before the window is no work."""
    generator = torch.Generator().manual_seed(seed)
    made, layer = backend(sliding_window=window)
    lengths = torch.randint(0, 900, (7,), generator=generator).tolist()
    made.plan(make_batch([1] * 7, lengths).batch)
    space = made._workspaces[shape_of(layer)]
    tile, chunk = space.tuning.decode.tile, int(space.chunk)
    skipped = [0 if window is None else max(0, length - window + 1) // tile for length in lengths]
    tiles = [-(-(length + 1) // tile) - first for length, first in zip(lengths, skipped, strict=True)]
    parts = space.split_start[:8].diff().tolist()
    assert chunk >= MIN_TILES
    assert [(count - 1) * chunk < needed <= count * chunk for count, needed in zip(parts, tiles, strict=True)] == [
        True
    ] * 7
    assert int(space.split_start[7]) <= 7 + space.target


@pytest.mark.parametrize("query_lens", [[1, 1, 4], [1, 5, 1], [9, 40], [1, 4, 0], [33] * 3, [5] * 8, [4] * 8])
def test_every_row_is_served_by_one_of_the_shapes_and_within_the_grid(query_lens):
    made, layer = backend()
    space = made._workspaces[shape_of(layer)]
    assert space.decode_queries == 4
    batch = make_batch(query_lens, [20] * len(query_lens)).batch
    (launches,) = made.plan(batch).launches.values()
    count = len(query_lens)
    parts, blocks = (start[: count + 1].diff().tolist() for start in (space.split_start, space.block_start))
    size = space.prefill_block // 4
    assert [bool(part) for part in parts] == [length <= 4 for length in query_lens]
    assert blocks == [0 if length <= 4 else -(-length // size) for length in query_lens]
    assert set(launches) >= {length <= 4 for length in query_lens}
    for split, work in ((True, sum(parts)), (False, sum(blocks))):
        assert work <= _grid(batch, shape_of(layer), space, split)


def test_windows_have_plans_of_their_own():
    layers = tuple(AttentionLayer(i, 8, 2, 64, 64, 0.1, sliding_window=window) for i, window in enumerate((64, None)))
    made = CudaPagedAttention(AttentionInit(torch.device("cpu"), torch.float32, layers, 16, 4, 512, 64))
    made.plan(make_batch([1], [800]).batch)
    parts = [int(made._workspaces[shape_of(layer)].split_start[1]) for layer in layers]
    assert parts[0] < parts[1]


def test_float32_has_tiles_that_no_tensor_core_is_needed_for():
    for head_dim in (64, 256):
        tuning = tuning_for((9, 0), head_dim, exact=True)
        assert max(tuning.decode.tile, tuning.prefill.tile, tuning.prefill.block_m) == 16
