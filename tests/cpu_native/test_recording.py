"""What is recorded and what cannot be; how a recording that is not the whole step is found out."""

import ctypes
import gc
import itertools
import random
import threading

import pytest
import torch
from pydantic import ValidationError
from quire.contract.device import GraphKey
from quire.plugin import DeviceInit, GatedActSpec, LinearSpec, OpInit, RMSNormSpec
from quire.testing.device import DeviceConformance
from quire_cpu_native.build import missing
from quire_cpu_native.device import NativeDevice, NativeDeviceOptions, RecordingRunner, same_bits
from quire_cpu_native.native import LISTENER, native
from quire_cpu_native.ops import NativeOps
from quire_cpu_native.recording import CHUNK, Kernels, Recorder, Workspace
from quire_cpu_ref.ops import TorchOps

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
KEY = GraphKey(1, 3, 3)
SIZE = 48


class TestNativeDevice(DeviceConformance):
    @pytest.fixture
    def device_class(self):
        return NativeDevice


@pytest.fixture
def runner():
    with torch.inference_mode():
        yield RecordingRunner([3])


@pytest.fixture(scope="module")
def block():
    """x [3, 48] -> a norm with residual, a product and a gate in C++, with torch between them."""
    ops, dtype = NativeOps(OpInit(torch.device("cpu"), 16)), torch.float32
    norm = ops.build(RMSNormSpec(SIZE, 1e-5, dtype, 0.25))
    linear, act = ops.build(LinearSpec(SIZE, 2 * SIZE, True, dtype)), ops.build(GatedActSpec(SIZE, "silu", dtype))
    state, weight = linear.pack(torch.randn(2 * SIZE, SIZE), torch.randn(2 * SIZE)), torch.rand(SIZE)

    def run(x):
        normed, residual = norm(x * 2, weight, x.clone())
        gated = act(linear(normed, state))
        gated[1:] += residual[:-1].t().reshape(-1).view(2, SIZE)
        parts = torch.cat([gated, residual], -1).split(SIZE, -1)
        return norm(parts[1].contiguous(), weight)[0].add_(parts[0])

    return run


def watched(work):
    """The work, with a list that grows each time that it really runs."""
    runs = []

    def run():
        runs.append(None)
        return work()

    return run, runs


def test_a_recording_computes_anew_from_what_stands_at_its_inputs(runner, block):
    x = torch.empty(3, SIZE)
    work, runs = watched(lambda: block(x))
    for step in range(5):
        x.normal_()
        expected = block(x)
        assert same_bits(runner.run(KEY, work), expected)
        assert len(runs) == min(step + 1, 2), "recorded, proven, and then replayed alone"
    runner.run(None, work)
    runner.run(GraphKey(1, 2, 2), work)
    assert len(runs) == 4, "what has no key, or another one, runs"


def test_kernels_that_follow_each_other_become_one_call(block):
    x = torch.randn(3, SIZE)
    recorder = Recorder(Workspace(), native(torch.get_num_threads()))
    recording = recorder.recording(recorder.run(lambda: block(x)))
    kinds = [len(piece._calls) if isinstance(piece, Kernels) else 0 for piece in recording.pieces]
    assert [kind for kind in kinds if kind] == [3, 1]
    assert not recorder.why_not


def test_weights_that_torch_has_packed_are_recorded(runner):
    x, linear = (
        torch.randn(3, SIZE),
        TorchOps(OpInit(torch.device("cpu"), 16)).build(LinearSpec(SIZE, 8, False, torch.float32)),
    )
    state = linear.pack(torch.randn(8, SIZE), None)
    work, runs = watched(lambda: linear(x, state))
    for _ in range(3):
        x.normal_()
        torch.testing.assert_close(runner.run(KEY, work), linear(x, state))
    assert len(runs) == 2


def test_addresses_stay_good_when_the_work_is_forgotten(runner, block):
    x = torch.randn(3, SIZE)
    for _ in range(2):
        runner.run(KEY, lambda: block(x.view(3, SIZE)[:].contiguous() + torch.tensor([0.5])))
    gc.collect()
    litter = [torch.full((3, SIZE), float("nan")) for _ in range(200)]  # where freed memory would be
    assert same_bits(runner.run(KEY, None), block(x + 0.5))
    assert len(litter) == 200


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: x * x[0, 0].item(), "the host reads a value (aten.item"),
        (lambda x: x * x.tolist()[0][0], "the host reads a value"),
        (lambda x: x * float(x.numpy()[0, 0]), "the host reads a value"),
        (lambda x: x if x.sum() > 0 else x + 1, "the host reads a value (aten.is_nonzero"),
        (lambda x: x if torch.equal(x, x) else x + 1, "the host reads a value (aten.equal"),
        (lambda x: x[x > 0], "a shape depends on values (aten.index"),
        (lambda x: x.nonzero() + x.nonzero(), "a shape depends on values (aten.nonzero"),
        (lambda x: (x + 1).resize_(4, 5), "a tensor changes its shape (aten.resize_"),
        (lambda x: (x + 1).t_(), "a tensor changes its shape (aten.t_"),
        (lambda x: x.to_mkldnn().to_dense(), "a tensor has no address (aten.to_mkldnn"),
        (lambda x: [x + 1], "it returns no tensor, but list"),
    ],
)
def test_what_is_not_the_same_every_time_is_not_recorded(runner, caplog, work, reason):
    x = torch.ones(3, SIZE)
    watching, runs = watched(lambda: work(x))
    for _ in range(3):
        runner.run(KEY, watching)
    assert len(runs) == 3
    assert [record.message.count(reason) for record in caplog.records] == [1], caplog.text


def copied(x):
    """As a kernel of somebody else computes: torch does not see it."""
    out = torch.empty_like(x)
    ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8], ids=str)
def test_what_computes_unseen_is_found_out(runner, caplog, dtype):
    """The same input every time: only because the memory is spoilt does the old value not pass."""
    x = torch.arange(1, 13).view(3, 4).to(dtype)
    work, runs = watched(lambda: copied(x) + 1)
    for _ in range(4):
        assert torch.equal(runner.run(KEY, work), x + 1)
    assert len(runs) == 4
    assert caplog.text.count("computes beside torch") == 1


def test_a_number_that_the_host_carries_from_step_to_step_is_found_out(runner, caplog):
    x, count = torch.randn(3, 4), itertools.count()
    for step in range(4):
        assert torch.equal(runner.run(KEY, lambda: x + next(count)), x + step)
    assert caplog.text.count("not recorded") == 1


def test_a_replay_that_fails_in_its_proof_is_given_up(runner, caplog):
    table, five = torch.randn(3, 4), torch.tensor([5])
    for _ in range(2):
        assert torch.equal(runner.run(KEY, lambda: table[copied(five) - five]), table[[0]])
    assert "a replay failed: IndexError" in caplog.text


def test_a_step_that_fails_leaves_nothing_behind(runner, block):
    x = torch.randn(3, SIZE)

    def fails():
        block(x)
        raise RuntimeError("broken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            runner.run(KEY, fails)
    assert LISTENER.get() is None
    work, runs = watched(lambda: block(x))
    for _ in range(2):
        runner.run(KEY, work)
    with pytest.raises(RuntimeError, match="broken"):
        runner.run(GraphKey(1, 1, 1), fails)
    assert same_bits(runner.run(KEY, work), block(x))
    assert len(runs) == 2


def test_a_step_that_fails_in_its_proof_is_recorded_anew(runner, block):
    x, fails = torch.randn(3, SIZE), [False]

    def work():
        if fails[0]:
            raise RuntimeError("broken")
        return block(x)

    runner.run(KEY, work)
    fails[0] = True
    with pytest.raises(RuntimeError, match="broken"):
        runner.run(KEY, work)
    fails[0] = False
    watching, runs = watched(work)
    for _ in range(4):
        assert same_bits(runner.run(KEY, watching), block(x))
    assert len(runs) == 2


def test_recordings_of_all_sizes_share_the_memory_of_the_largest():
    with torch.inference_mode():
        runner, inputs = RecordingRunner(range(1, 9)), {n: torch.empty(n, SIZE) for n in range(1, 9)}
        rng = random.Random(0)
        sizes = [size for size in inputs for _ in range(4)]
        rng.shuffle(sizes)
        for size in sizes + sizes:
            x = inputs[size].normal_()
            found = runner.run(GraphKey(1, size, size), lambda x=x: wide(x))
            assert same_bits(found, wide(x))
        assert len(runner._proven) == 8
        largest = 6 * 8 * SIZE * 3000 * 4
        assert largest <= runner._workspace.num_bytes <= largest + CHUNK


def wide(x):
    """Work in six pieces of memory that is given without content, 0.6 MB of each for a row."""
    pieces = [torch.empty(len(x), 3000, SIZE) for _ in range(6)]
    pieces[0].copy_(x[:, None])
    for before, after in itertools.pairwise(pieces):
        torch.add(before, 1, out=after)
    return x.new_empty(len(x), 7).copy_(pieces[-1][:, -1, -7:])


def test_a_large_size_is_recorded_when_it_has_come_often_enough(block):
    with torch.inference_mode():
        runner, x = RecordingRunner([12, 13]), torch.randn(3, SIZE)
        for rows, eager in ((12, 3), (13, 4)):
            work, runs = watched(lambda: block(x))
            for step in range(8):
                runner.run(GraphKey(1, rows, rows), work)
                assert len(runs) == min(step + 1, eager + 1), "until it is recorded, and once for the proof"


def test_a_workspace_keeps_strides_and_gives_the_same_places_again():
    workspace = Workspace()
    kinds = [torch.empty(3, 5).t(), torch.empty(0, 4), torch.empty(7, dtype=torch.int8)[::2], torch.empty(CHUNK, 2)]
    kinds.append(torch.empty(2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 1))
    rounds = []
    for _ in range(2):
        workspace.rewind()
        made = [workspace.like(kind) for kind in kinds]
        for value, tensor in enumerate(made):
            tensor.fill_(value)
        for value, (tensor, kind) in enumerate(zip(made, kinds, strict=True)):
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (kind.shape, kind.stride(), kind.dtype)
            assert tensor.data_ptr() % 64 == 0
            assert bool((tensor == value).all())
        rounds.append([tensor.data_ptr() for tensor in made])
    assert rounds[0] == rounds[1]


def test_new_caches_make_new_recordings(runner):
    old, new = torch.ones(3), torch.full((3,), 7.0)
    for _ in range(3):
        runner.run(KEY, lambda: old + 1)
    runner.capture(KEY, lambda: new + 1)
    for _ in range(3):
        assert runner.run(KEY, lambda: new + 1).tolist() == [8.0] * 3


def test_other_threads_are_not_recorded(block):
    x, recorder = torch.randn(3, SIZE), Recorder(Workspace(), native(torch.get_num_threads()))

    def work():
        other = threading.Thread(target=lambda: block(torch.randn(3, SIZE)))
        other.start()
        other.join()
        return x + 1

    recording = recorder.recording(recorder.run(work))
    assert len(recording.pieces) == 1


def test_sizes_are_an_option():
    def keys(**options):
        return NativeDevice(DeviceInit(options=NativeDeviceOptions(**options))).graph_runner().keys()

    assert keys() == NativeDevice(DeviceInit()).graph_runner().keys() == tuple(GraphKey(1, n, n) for n in range(1, 65))
    assert keys(recorded_sizes=(2, 16)) == (GraphKey(1, 2, 2), GraphKey(1, 16, 16))
    assert keys(recorded_sizes=()) == ()
    with pytest.raises(ValidationError, match="greater than 0"):
        keys(recorded_sizes=(0,))
