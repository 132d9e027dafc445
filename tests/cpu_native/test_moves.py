"""Kernels in place of torch's operations, replayed on new content, against these operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.errors import EngineError
from quire.loader.files import StoredTensor
from quire.loader.rows import StoredRows
from quire_cpu_native.build import missing
from quire_cpu_native.device import same_bits
from quire_cpu_native.native import native
from quire_cpu_native.recording import Kernels, Recorder, Workspace

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8]


def recorded(work):
    """(the recording, how many of its pieces are operations of torch)"""
    recorder = Recorder(Workspace(), native(torch.get_num_threads()))
    recording = recorder.recording(recorder.run(work))
    assert not recorder.why_not
    assert recording.is_native == all(isinstance(piece, Kernels) for piece in recording.pieces)
    return recording, sum(not isinstance(piece, Kernels) for piece in recording.pieces)


def numbers(shape, dtype):
    return torch.randint(0, 200, shape).to(dtype)


@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([(), (1,), (7,), (64,), (3, 5)]),
    count=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_rows_by_their_numbers(rows, width, count, dtype):
    table, index = numbers((rows, *width), dtype), torch.randint(0, rows, (count,))
    taken, operations = recorded(lambda: table.index_select(0, index))
    source = numbers((count, *width), dtype)
    put, more = recorded(lambda: table.index_copy_(0, index, source))
    assert operations == more == 0
    for _ in range(2):
        table.copy_(numbers(table.shape, dtype))
        source.copy_(numbers(source.shape, dtype))
        index.copy_(torch.randperm(rows).repeat(9)[:count])
        assert same_bits(taken.replay(), table[index])
        expected = table.clone()
        for place, row in zip(index.tolist(), source, strict=True):  # the last one stays, where some are the same
            expected[place] = row
        assert same_bits(put.replay(), expected)
        assert same_bits(table, expected)


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), least=st.integers(-5, 5))
@settings(max_examples=40, deadline=None)
def test_whole_numbers_are_widened_and_raised(values, least):
    narrow, wide = torch.zeros(len(values), dtype=torch.int32), torch.zeros(len(values), dtype=torch.int64)
    copied, operations = recorded(lambda: wide.copy_(narrow))
    raised, more = recorded(lambda: narrow.clamp(min=least))
    assert operations == more == 0
    narrow.copy_(torch.tensor(values, dtype=torch.int32))
    assert copied.replay().tolist() == wide.tolist() == values
    assert raised.replay().tolist() == [max(least, value) for value in values]


def test_an_embedding_takes_rows():
    weight, ids = torch.randn(50, 16).bfloat16(), torch.zeros(3, dtype=torch.int64)
    recording, operations = recorded(lambda: torch.nn.functional.embedding(ids, weight))
    ids.copy_(torch.tensor([49, 0, 7]))
    assert same_bits(recording.replay(), weight[ids])
    assert operations == 0


@pytest.mark.parametrize(
    "work",
    [
        lambda x, i: x.index_select(1, i),
        lambda x, i: x.t().index_select(0, i),
        lambda x, i: x.index_select(0, i.int()),
        lambda x, i: x.index_select(0, i.repeat(2)[::2]),
        lambda x, i: x.clone().index_copy_(1, i, x[:, :3]),
        lambda x, i: x.clone().t().index_copy_(0, i, x[:3]),
        lambda x, i: torch.nn.functional.embedding(i.view(1, 3), x),
        lambda x, i: torch.zeros(3, dtype=torch.float64).copy_(i),
        lambda x, i: torch.zeros(2, 3, dtype=torch.int64).copy_(i.int()),
        lambda x, i: i.int().clamp(min=1, max=2),
        lambda x, i: i.clamp(min=1),
        lambda x, i: x.clamp(min=0.5),
        lambda x, i: i.int().clamp(min=0.5),
    ],
)
def test_other_forms_stay_operations(work):
    x, index = torch.randn(5, 5), torch.tensor([1, 2, 0])
    recording, operations = recorded(lambda: work(x, index))
    x.normal_()
    index.copy_(torch.tensor([3, 0, 4]))
    assert operations
    assert same_bits(recording.replay(), work(x, index))


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda x, i: x.index_select(0, i), "index out of range"),
        (lambda x, i: x.index_copy_(0, i, x[:2].clone()), "out of"),
        (lambda x, i: torch.nn.functional.embedding(i, x), "index out of range"),
    ],
)
def test_numbers_of_rows_that_there_are_not_are_torchs_error(work, error, bad):
    x, index = torch.randn(5, 4), torch.tensor([1, 2])
    recording, _ = recorded(lambda: work(x, index) * 2)
    index[1] = bad
    with pytest.raises((IndexError, RuntimeError), match=error):
        recording.replay()
    index[1] = 3
    recording.replay()


def test_rows_of_a_file(tmp_path):
    path, rows = tmp_path / "rows", torch.randn(20, 8)
    path.write_bytes(b"head" * 3 + rows.numpy().tobytes())
    stored = StoredRows(StoredTensor(path, (20, 8), torch.float32, 12))
    ids = torch.tensor([0, 1, 2])
    recording, operations = recorded(lambda: stored(ids))
    assert operations == 0
    ids.copy_(torch.tensor([19, 3, 3]))
    assert same_bits(recording.replay(), rows[ids])
    with path.open("r+b") as file:
        file.truncate(12 + 19 * 32 + 5)
    with pytest.raises(EngineError, match="cut short"):
        recording.replay()
    ids[0] = 18
    assert same_bits(recording.replay(), rows[ids])
