"""Faulty operations, quantization methods, models and devices."""

from __future__ import annotations

import dataclasses

import torch
from quire.models.qwen3 import SPEC
from quire.plugin import Device, GraphKey, GraphRunner, MemoryInfo, OpInit
from quire_cpu_ref.device import CpuDevice
from quire_cpu_ref.linear import TorchLinear
from quire_cpu_ref.ops import TorchOps
from quire_quant.gptq import GPTQMethod
from quire_quant.kernels import Dequant, DequantOps
from quire_quant.rounding import Int8Method, RoundedLinear

from kit_faults.fault import Fault

INIT = OpInit(torch.device("cpu"), 256)


class Wrong(TorchOps):
    """Spoils the operations of one kind."""

    def __init__(self, kind, spoil):
        super().__init__(INIT)
        self._kind, self._spoil = kind, spoil

    def build(self, spec):
        op = super().build(spec)
        return self._spoil(op, spec) if spec.kind == self._kind else op


def forgets_residual(op, spec):
    return lambda x, weight, residual=None: (op(x, weight)[0], residual)


def ignores_offset(op, spec):
    return TorchOps(INIT).build(dataclasses.replace(spec, weight_offset=0.0))


def swaps_gate_and_value(op, spec):
    return lambda x: op(torch.cat((x[..., spec.size :], x[..., : spec.size]), -1))


def takes_other_gelu(op, spec):
    names = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "silu"}
    return TorchOps(INIT).build(dataclasses.replace(spec, activation=names[spec.activation]))


class IgnoresZeros(Dequant):
    """Takes the middle for every zero point."""

    def pack(self, codes, scales, zeros):
        return super().pack(
            codes, scales, zeros if zeros is None else torch.full_like(zeros, 1 << (self.spec.bits - 1))
        )


class FaultyDequant(DequantOps):
    def build(self, spec):
        return IgnoresZeros(spec)


def forgets_renormalization(op, spec):
    return TorchOps(INIT).build(dataclasses.replace(spec, renormalize=False))


class ForgetsBias(TorchLinear):
    def pack(self, weight, bias):
        return super().pack(weight, None)


class SharesAScale(TorchLinear):
    """Rounds the inputs on one grid for the whole batch, as some quantized kernels do."""

    def __call__(self, x, state):
        scale = x.abs().max() / 127 if x.numel() else 1.0
        return super().__call__((x / scale).round() * scale, state)


class HalvesFewRows(TorchLinear):
    """Sums in two halves where there are few rows, as kernels that split the sum among threads do.

    Whether another kernel of torch's gives other bits depends on the processor; another order of summation
    gives them on any.
    """

    def pack(self, weight, bias):
        half = weight.shape[1] // 2
        state = super().pack(weight, bias)
        return (
            state,
            [super(HalvesFewRows, self).pack(part, None) for part in (weight[:, :half], weight[:, half:])],
            bias,
        )

    def __call__(self, x, state):
        whole, (left, right), bias = state
        if x.shape[0] > 16 or x.shape[0] == 0:
            return super().__call__(x, whole)
        half = x.shape[1] // 2
        total = super().__call__(x[:, :half], left) + super().__call__(x[:, half:], right)
        return total if bias is None else total + bias


class FaultyRounding(Int8Method):
    """Makes layers of `kind`."""

    kind = RoundedLinear

    def linear(self, spec, sources):
        return None if super().linear(spec, sources) is None else self.kind(spec, self._form, self.init)


class RoundsInputs(FaultyRounding):
    """Activations on one grid for the whole batch."""

    class kind(RoundedLinear):
        def forward(self, x, state, bias):
            scale = x.abs().max() / 2**20 if x.numel() else 1.0
            return super().forward((x / scale).round() * scale, state, bias)


class DropsQuantBias(FaultyRounding):
    class kind(RoundedLinear):
        def forward(self, x, state, bias):
            return super().forward(x, state, None)


class OneScaleForAll(FaultyRounding):
    """The largest weight of the whole layer sets the grid, so that shards differ from the whole."""

    class kind(RoundedLinear):
        def finalize(self, tensors, device):
            step = tensors["weight"].abs().max() / 100
            return super().finalize({"weight": (tensors["weight"] / step).round() * step}, device)


class SkipsTheTail(FaultyRounding):
    """Outputs beyond the last whole tile of 8 are left at zero."""

    class kind(RoundedLinear):
        def forward(self, x, state, bias):
            out = super().forward(x, state, bias)
            out[:, out.shape[1] // 8 * 8 :] = 0
            return out


class ZeroPointOffByOne(GPTQMethod):
    """Reads the first form's zero points as the second's."""

    def __init__(self, init):
        super().__init__(init)
        self.is_v1 = not self.is_v1


def spec_with(change):
    """Qwen3, whose built model `change` spoils."""

    def build(init):
        model = SPEC.build(init)
        change(model)
        return model

    return dataclasses.replace(SPEC, build=build)


def positions_of_the_batch(model):
    forward = model.forward
    model.forward = lambda ids, positions, ctx: forward(ids, torch.arange(len(ids)), ctx)


def names_nothing(model):
    model.missing_weights = list


def takes_anything(model):
    load = model.load_weight
    model.load_weight = lambda name, tensor: load(name, tensor) or True


def wants_the_first(model):
    """The right number of states, of the wrong tokens."""
    forward = model.forward

    def forward_first(ids, positions, ctx):
        wanted = None if ctx.wanted is None else torch.arange(len(ctx.wanted))
        return forward(ids, positions, dataclasses.replace(ctx, wanted=wanted))

    model.forward = forward_first


def caches_what_is_wanted(model):
    """Leaves tokens out before the last layer has cached them."""
    forward = model.forward

    def forgetful(ids, positions, ctx):
        states = forward(ids, positions, ctx)
        if ctx.wanted is not None:
            kept = ctx.batch.slot_mapping[ctx.wanted]
            others = [slot for slot in ctx.batch.slot_mapping.tolist() if slot not in kept.tolist()]
            for cache in ctx.kv[-1]:
                cache.view(-1, *cache.shape[2:])[others] = 0
        return states

    model.forward = forgetful


def scales_logits(model):
    logits = model.logits
    model.logits = lambda hidden: logits(hidden) * 1.01


class MemoryLies(CpuDevice):
    def memory(self):
        memory = super().memory()
        return MemoryInfo(memory.free, memory.total + 1)


class DirtyBuffers(CpuDevice):
    def host_buffer(self, shape, dtype):
        return torch.full(tuple(shape), 7, dtype=dtype)


class ClaimsIntegers(CpuDevice):
    def dtypes(self):
        return (*super().dtypes(), torch.uint16)


class StaleRunner(GraphRunner):
    """Gives the first captured result for every key."""

    def __init__(self):
        self.first = None

    def keys(self):
        return (GraphKey(1, 1, 1), GraphKey(1, 2, 2))

    def run(self, key, work):
        if key is None:
            return work()
        self.first = torch.zeros_like(work()) if self.first is None else self.first
        return self.first


class StaleGraphs(CpuDevice):
    def graph_runner(self):
        return StaleRunner()


class LateRunner(GraphRunner):
    """Runs two steps of a key, and gives the second one's result from then on."""

    lazy = True

    def __init__(self):
        self.results = {}

    def keys(self):
        return (GraphKey(1, 1, 1), GraphKey(1, 2, 2))

    def run(self, key, work):
        results = self.results.setdefault(key, [])
        if key is None or len(results) < 2:
            results.append(work())
        return results[-1]


class LateGraphs(CpuDevice):
    def graph_runner(self):
        return LateRunner()


class KeepsRunner(GraphRunner):
    """Runs each step, but for what it is asked to replay."""

    lazy = True

    def __init__(self):
        self.result = None

    def keys(self):
        return (GraphKey(1, 1, 1),)

    def run(self, key, work):
        self.result = work()
        return self.result

    def replay(self, key):
        return self.result


class KeptGraphs(CpuDevice):
    def graph_runner(self):
        return KeepsRunner()


assert issubclass(StaleGraphs, Device)

FAULTS = (
    Fault("residual not added", "op", Wrong("rms_norm", forgets_residual)),
    Fault("norm's offset ignored", "op", Wrong("rms_norm", ignores_offset)),
    Fault("gate and value swapped", "op", Wrong("gated_act", swaps_gate_and_value)),
    Fault("the other gelu", "op", Wrong("gated_act", takes_other_gelu)),
    Fault("bias dropped in packing", "op", Wrong("linear", lambda _, spec: ForgetsBias(spec))),
    Fault("inputs rounded by a scale of the batch", "op", Wrong("linear", lambda _, spec: SharesAScale(spec))),
    Fault("experts' weights not renormalized", "op", Wrong("moe", forgets_renormalization)),
    Fault("zero points ignored", "op", FaultyDequant(INIT)),
    Fault("few rows summed in another order", "op", Wrong("linear", lambda _, spec: HalvesFewRows(spec))),
    Fault("rows share an activation scale", "quantization", RoundsInputs),
    Fault("bias dropped", "quantization", DropsQuantBias),
    Fault("one scale for the whole layer: shards differ", "quantization", OneScaleForAll),
    Fault("last outputs skipped", "quantization", SkipsTheTail),
    Fault("zero point off by one", "quantization", ZeroPointOffByOne, GPTQMethod.conformance),
    Fault("positions taken from the batch", "model", spec_with(positions_of_the_batch)),
    Fault("missing tensors pass in silence", "model", spec_with(names_nothing)),
    Fault("unknown tensors pass in silence", "model", spec_with(takes_anything)),
    Fault("logits scaled", "model", spec_with(scales_logits)),
    Fault("states of other tokens than were wanted", "model", spec_with(wants_the_first)),
    Fault("tokens that nobody wants are not cached", "model", spec_with(caches_what_is_wanted)),
    Fault("more memory free than there is", "device", MemoryLies),
    Fault("host buffers not zeroed", "device", DirtyBuffers),
    Fault("a dtype that it cannot compute", "device", ClaimsIntegers),
    Fault("every graph key replays the first", "device", StaleGraphs),
    Fault("a replay gives the last result", "device", KeptGraphs),
    Fault("a lazy graph replays old results", "device", LateGraphs),
)
