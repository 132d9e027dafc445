"""cpu_ref's operations and device pass the kit."""

import dataclasses

import pytest
import torch
from quire.plugin import DeviceInit, LinearSpec, OpSpec
from quire.testing.device import DeviceConformance
from quire.testing.op import OpConformance
from quire_cpu_ref import device as device_module
from quire_cpu_ref.device import CpuDevice, CpuOptions
from quire_cpu_ref.linear import PackedLinear, packs_well
from quire_cpu_ref.moe import route
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
    monkeypatch.setattr(device_module, "CGROUP_LIMITS", ((limit, use),))
    memory = CpuDevice(DeviceInit()).memory()
    assert (memory.total, memory.free) == (2**30, 2**29)
    limit.write_text("max\n")
    assert CpuDevice(DeviceInit()).memory().total > 2**30


def test_routing_weights():
    weights, experts = route(torch.tensor([[0.0, 2.0, 1.0]]), 2, True)
    assert experts.tolist() == [[1, 2]]
    assert float(weights.sum()) == pytest.approx(1.0)


class Wrong(TorchOps):
    """Spoils the operations of one kind."""

    def __init__(self, kind, spoil):
        super().__init__(OpConformance.init())
        self._kind, self._spoil = kind, spoil

    def build(self, spec):
        op = super().build(spec)
        return self._spoil(op, spec) if spec.kind == self._kind else op


def forgets_residual(op, spec):
    return lambda x, weight, residual=None: (op(x, weight)[0], residual)


def ignores_offset(op, spec):
    return TorchOps(OpConformance.init()).build(dataclasses.replace(spec, weight_offset=0.0))


def swaps_gate_and_value(op, spec):
    return lambda x: op(torch.cat((x[..., spec.size :], x[..., : spec.size]), -1))


def takes_other_gelu(op, spec):
    names = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "silu"}
    return TorchOps(OpConformance.init()).build(dataclasses.replace(spec, activation=names[spec.activation]))


def forgets_renormalization(op, spec):
    return TorchOps(OpConformance.init()).build(dataclasses.replace(spec, renormalize=False))


class HalvesFewRows(PackedLinear):
    """Sums in two halves where there are few rows, as kernels that split the sum among threads do.

    Whether another kernel of torch's gives other bits depends on the processor; another order of summation
    gives them on any.
    """

    def pack(self, weight, bias):
        half = weight.shape[1] // 2
        return [super(HalvesFewRows, self).pack(part, None) for part in (weight, weight[:, :half], weight[:, half:])]

    def __call__(self, x, state):
        whole, left, right = state
        if x.shape[0] > 16:
            return super().__call__(x, whole)
        half = x.shape[1] // 2
        return super().__call__(x[:, :half], left) + super().__call__(x[:, half:], right)


class ForgetsBias(PackedLinear):
    def pack(self, weight, bias):
        return super().pack(weight, None)


class SharesAScale(PackedLinear):
    """Rounds the inputs on one grid for the whole batch, as some quantized kernels do."""

    def __call__(self, x, state):
        if x.numel() == 0:
            return super().__call__(x, state)
        scale = x.abs().max() / 127
        return super().__call__((x / scale).round() * scale, state)


@pytest.mark.parametrize(
    ("check", "kind", "spoil"),
    [
        (lambda kit, ops: kit.test_rms_norm(ops, 7, 0.0, torch.float32), "rms_norm", forgets_residual),
        (lambda kit, ops: kit.test_rms_norm(ops, 7, 1.0, torch.float32), "rms_norm", ignores_offset),
        (lambda kit, ops: kit.test_gated_act(ops, 7, "silu", torch.float32), "gated_act", swaps_gate_and_value),
        (lambda kit, ops: kit.test_gated_act(ops, 130, "gelu", torch.float32), "gated_act", takes_other_gelu),
        (lambda kit, ops: kit.test_linear(ops, 7, False, True, torch.float32), "linear", lambda _, s: ForgetsBias(s)),
        (lambda kit, ops: kit.test_linear(ops, 7, False, False, torch.float32), "linear", lambda _, s: SharesAScale(s)),
        (
            lambda kit, ops: kit.test_values_of_neighbours_do_not_matter(ops, "linear", torch.float32),
            "linear",
            lambda _, s: SharesAScale(s),
        ),
        (lambda kit, ops: kit.test_moe(ops, 7, False, True), "moe", forgets_renormalization),
        (
            lambda kit, ops: kit.test_deterministic_forms_do_not_see_their_neighbours(ops, "linear", torch.float32),
            "linear",
            lambda _, s: HalvesFewRows(s),
        ),
    ],
)
def test_the_kit_kills(check, kind, spoil):
    kit = OpConformance()
    check(kit, TorchOps(kit.init()))
    with pytest.raises(AssertionError):
        check(kit, Wrong(kind, spoil))
