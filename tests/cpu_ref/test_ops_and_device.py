"""cpu_ref's operations and device pass the kit."""

import pytest
import torch
from kit_faults.layers import Wrong, forgets_residual
from quire.contract import host_device
from quire.contract import ops as contract_ops
from quire.plugin import DeviceInit, LinearSpec, OpSpec, mixture, torch_linear
from quire.testing.device import DeviceConformance
from quire.testing.op import OpConformance
from quire_cpu_ref.device import CpuDevice, CpuOptions
from quire_cpu_ref.linear import PackedLinear, packs_well
from quire_cpu_ref.ops import TorchOps


class TestTorchOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return TorchOps(self.init())


@pytest.mark.parametrize("bias", [False, True])
def test_the_kit_works_on_any_device(bias):
    class Elsewhere(OpConformance):
        device = "cpu:0"  # not the word `cpu`, so tensors are moved

    kit = Elsewhere()
    ops = TorchOps(kit.init(kit.device))
    kit.test_linear(ops, 7, False, bias, torch.float32)
    kit.test_rms_norm(ops, 7, 0.0, torch.float32)
    kit.test_moe(ops, 7, False, True)
    with pytest.raises(AssertionError):
        kit.test_rms_norm(Wrong("rms_norm", forgets_residual), 7, 0.0, torch.float32)


class TestCpuDevice(DeviceConformance):
    @pytest.fixture
    def device_class(self):
        return CpuDevice


def test_unknown_kinds_are_passed_over():
    class Odd(OpSpec):
        kind = "odd"

    assert "odd" in TorchOps(OpConformance.init()).why_not(Odd())[0]


def test_packing_is_for_dtypes_that_the_processor_computes():
    cpu = torch.device("cpu")
    assert not packs_well(LinearSpec(8, 8, False, torch.float16), cpu)
    assert not packs_well(LinearSpec(8, 8, False, torch.bfloat16), torch.device("meta"))


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_through_float32(monkeypatch, dtype, has_kernels):
    """On a processor that has no instructions for it, and on one that has: one product in float64."""
    monkeypatch.setattr(contract_ops, "_has_kernels", lambda *_: has_kernels)
    monkeypatch.setattr(contract_ops, "WIDENED_ELEMENTS", 40 * 96)
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((103, 96), (103,)))
    for rows in (0, 1, 3, 4, 17, 64):
        x = torch.randn(rows, 200, generator=generator).to(dtype)[:, 3:99]
        for offset in (None, bias):
            exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
            OpConformance().close(torch_linear(x, weight, offset), exact, dtype)


@pytest.mark.skipif(not packs_well(LinearSpec(8, 8, False, torch.bfloat16), torch.device("cpu")), reason="no bfloat16")
def test_packed_linear_frees_the_plain_weight():
    linear = PackedLinear(LinearSpec(8, 8, False, torch.bfloat16))
    state = linear.pack(torch.ones(8, 8, dtype=torch.bfloat16), None)
    assert state.weight.is_mkldnn


def test_threads_are_an_option():
    before = torch.get_num_threads()
    try:
        CpuDevice(DeviceInit(options=CpuOptions(threads=1)))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_container_limit_is_respected(tmp_path, monkeypatch):
    limit, use = tmp_path / "max", tmp_path / "current"
    limit.write_text(str(2**30))
    use.write_text(str(2**29))
    monkeypatch.setattr(host_device, "CGROUP_LIMITS", ((limit, use),))
    memory = CpuDevice(DeviceInit()).memory()
    assert (memory.total, memory.free) == (2**30, 2**29)
    limit.write_text("max\n")
    assert CpuDevice(DeviceInit()).memory().total > 2**30


def test_experts_are_weighted_by_their_probabilities_and_run_once():
    logits, calls = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]), []

    def expert(number, rows):
        calls.append((number, rows[:, 0].tolist()))
        return torch.full_like(rows, 10.0**number)

    out = mixture(torch.tensor([[1.0], [2.0]]), logits, 2, renormalize=True, expert=expert)
    assert calls == [(0, [2.0]), (1, [1.0]), (2, [1.0, 2.0])]
    share = torch.sigmoid(torch.tensor([1.0, 2.0]))  # of two logits one and two apart
    torch.testing.assert_close(out[:, 0], share * torch.tensor([10.0, 1.0]) + (1 - share) * 100)
