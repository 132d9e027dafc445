"""Conformance of quantization methods: `forward` is multiplication by what `dequantize` returns, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.contract.ops import LinearSpec, OpSpec, QuantLinearSpec
from quire.contract.quant import QuantInit, QuantLinear, QuantMethod

ROWS = (0, 1, 3, 16, 17, 130)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


Sample = Callable[[int, int, int], tuple[Mapping[str, Tensor], Tensor]]
"""(in_features, out_features, seed) -> a layer's tensors as a checkpoint stores them, the weight [N, K] they mean."""


class ReferenceQuantLinear:
    """`quant_linear` by its definition: the weight is kept whole, each row is multiplied in float64, alone."""

    def __init__(self, spec: QuantLinearSpec) -> None:
        self.spec = spec

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        group = torch.arange(self.spec.in_features) // self.spec.group_size
        shift = float(1 << (self.spec.bits - 1)) if zeros is None else zeros[:, group]
        return ((codes.float() - shift) * scales[:, group]).to(self.spec.dtype)

    def __call__(self, x: Tensor, state: Tensor, bias: Tensor | None = None) -> Tensor:
        return _row_by_row(x, state, bias)

    def weight(self, state: Tensor) -> Tensor:
        return state


class ReferenceLinear:
    """`linear` by its definition, as above."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def pack(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor | None]) -> Tensor:
        return _row_by_row(x, *state)


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    for row, values in enumerate(x.double()):
        out[row] = (weight.double() * values).sum(-1).to(x.dtype)
    return out if bias is None else out + bias


def reference_op(spec: OpSpec) -> ReferenceLinear | ReferenceQuantLinear:
    """What methods under test multiply with: `QuantInit.op`. Kernels are tested by their own op sets' kit."""
    if isinstance(spec, LinearSpec):
        return ReferenceLinear(spec)
    assert isinstance(spec, QuantLinearSpec)
    return ReferenceQuantLinear(spec)


class QuantizationConformance:
    """What every method must hold. Subclass, and give the fixture `method_class`.

    A method that reads checkpoints gives `config` and `sample` as well, and `shapes` that its format can hold.
    """

    shapes: Sequence[tuple[int, int]] = ((256, 96), (384, 1), (128, 1500))
    """(in_features, out_features) to try; layers that the method leaves unquantized are skipped."""
    config: Mapping[str, Any] = MappingProxyType({})
    """The `quantization_config` of the checkpoint that the samples come from."""
    sample: Sample | None = None
    """Makes layers in the checkpoint's format (a static method); None: the method quantizes when it loads."""
    options: object = None
    """The instance of `Provider.options` to construct it with, or None."""
    op: Callable[[OpSpec], Any] = staticmethod(reference_op)
    """What it multiplies with, `QuantInit.op`."""
    rounding = 0.15
    """Largest relative error of a weight that is quantized when it is loaded."""

    @pytest.fixture
    def method_class(self) -> type[QuantMethod]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `method_class`")

    def init(self, dtype: torch.dtype) -> QuantInit:
        """What the method is made from, but for the names of stored tensors."""
        return QuantInit(self.config, {}, torch.device("cpu"), dtype, self.options, type(self).op)

    def method(self, method_class: type[QuantMethod], specs: Sequence[LinearSpec]) -> QuantMethod:
        """The method for a checkpoint that stores these layers."""
        init = self.init(specs[0].dtype)
        if self.sample is not None:
            stored = {
                f"{spec.name}.{suffix}": (tuple(tensor.shape), tensor.dtype)
                for spec in specs
                for suffix, tensor in _made(self.sample, spec.in_features, spec.out_features, 0)[0].items()
            }
            init = replace(init, stored=stored)
        return method_class(init)

    def stored(self, linear: QuantLinear, seed: int) -> Mapping[str, Tensor]:
        """A layer's tensors as a checkpoint would hold them."""
        if self.sample is not None:
            return _made(self.sample, linear.spec.in_features, linear.spec.out_features, seed)[0]
        generator = torch.Generator().manual_seed(seed)
        return {t.name: torch.randn(t.shape, generator=generator).to(t.dtype) for t in linear.tensors()}

    def make(self, method_class: type[QuantMethod], spec: LinearSpec) -> QuantLinear:
        linear = self.method(method_class, (spec,)).linear(spec, (spec,))
        if linear is None:
            pytest.skip(f"leaves a layer of {spec.in_features} inputs unquantized")
        return linear

    def layers(
        self, method_class: type[QuantMethod], dtype: torch.dtype, **fields: Any
    ) -> list[tuple[QuantLinear, Any]]:
        made = []
        for inputs, outputs in self.shapes:
            linear = self.make(method_class, LinearSpec(inputs, outputs, False, dtype, name="model.layer", **fields))
            made.append((linear, linear.finalize(self.stored(linear, inputs), torch.device("cpu"))))
        return made

    def test_dequantize_gives_the_weight(self, method_class: type[QuantMethod]) -> None:
        """The weight is what the stored tensors mean; one that was rounded when it was loaded is close to the original.

        If it fails: compare scales, zero points and the order of packed codes with the format's definition.
        """
        for linear, state in self.layers(method_class, torch.float32):
            weight, seed = linear.dequantize(state).double(), linear.spec.in_features
            if self.sample is not None:
                exact = _made(self.sample, seed, linear.spec.out_features, seed)[1].double()
                torch.testing.assert_close(weight, exact, atol=1e-5, rtol=1e-5)
            elif set(stored := self.stored(linear, seed)) == {"weight"}:
                error = (weight - stored["weight"].double()).norm() / stored["weight"].double().norm()
                assert error <= self.rounding, f"the relative error is {float(error):.3f}"

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("rows", ROWS)
    def test_forward_multiplies_by_the_dequantized_weight(
        self, method_class: type[QuantMethod], rows: int, dtype: torch.dtype
    ) -> None:
        """`forward` is x · dequantize(state)ᵀ + bias, for any number of rows, contiguous or not, with and without bias.

        If it fails: compare `dequantize` with the format's definition first, then the kernel with it; look at the last
        rows and at odd numbers of outputs.
        """
        for linear, state in self.layers(method_class, dtype):
            spec, generator = linear.spec, torch.Generator().manual_seed(rows)
            weight = linear.dequantize(state)
            assert weight.shape == (spec.out_features, spec.in_features)
            wide = torch.randn(rows, 2 * spec.in_features, generator=generator).to(dtype) / spec.in_features**0.5
            bias = torch.randn(spec.out_features, generator=generator).to(dtype)
            for x in (wide[:, : spec.in_features], wide[:, : spec.in_features].contiguous()):
                for offset in (None, bias):
                    exact = x.double() @ weight.double().T + (0.0 if offset is None else offset.double())
                    ours = linear.forward(x, state, offset)
                    assert ours.dtype is dtype
                    torch.testing.assert_close(ours.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    def test_fused_sources_equal_separate_ones(self, method_class: type[QuantMethod]) -> None:
        """Concatenating q, k and v before finalizing gives the rows of each finalized alone.

        If it fails: give each tensor's `out_dim` as stored; if formats cannot be joined, say so in `may_fuse`.
        """
        parts = [LinearSpec(256, size, False, torch.float32, name=f"m.{size}") for size in (96, 32, 32)]
        fused = replace(parts[0], out_features=160, name="m.fused")
        joint = self.method(method_class, parts).linear(fused, tuple(parts))
        assert joint is not None
        singles = [self.make(method_class, part) for part in parts]
        tensors = [self.stored(single, index) for index, single in enumerate(singles)]
        joined = {
            t.name: tensors[0][t.name]
            if t.out_dim is None
            else torch.cat([each[t.name] for each in tensors], t.out_dim)
            for t in joint.tensors()
        }
        device = torch.device("cpu")
        whole = joint.dequantize(joint.finalize(joined, device))
        alone = [s.dequantize(s.finalize(t, device)) for s, t in zip(singles, tensors, strict=True)]
        assert torch.equal(whole, torch.cat(alone))

    def test_shards_concatenate_to_the_whole(self, method_class: type[QuantMethod]) -> None:
        """A stored layer that is cut along its outputs gives, shard by shard, the rows of the whole.

        If it fails: `out_dim` is not the dimension that runs along the outputs, or something of the whole (a maximum,
        a number of blocks) went into every row.
        """
        sizes = (32, 64)
        whole = self.make(method_class, LinearSpec(256, sum(sizes), False, torch.float32, name="m.whole"))
        stored = {name: t for name, t in self.stored(whole, 0).items() if name in {t.name for t in whole.tensors()}}
        shapes, device = {t.name: t.shape for t in whole.tensors()}, torch.device("cpu")
        starts, rows = dict.fromkeys(shapes, 0), []
        for size in sizes:
            shard = self.make(method_class, LinearSpec(256, size, False, torch.float32, name=f"m.{size}"))
            tensors = {}
            for t in shard.tensors():
                if t.name not in stored:
                    continue
                tensors[t.name] = stored[t.name]
                if t.out_dim is not None and t.shape != shapes[t.name]:
                    count = t.shape[t.out_dim]
                    tensors[t.name] = stored[t.name].narrow(t.out_dim, starts[t.name], count).contiguous()
                    starts[t.name] += count
            rows.append(shard.dequantize(shard.finalize(tensors, device)))
        assert torch.equal(torch.cat(rows), whole.dequantize(whole.finalize(stored, device)))

    def test_neighbours_values_do_not_matter(self, method_class: type[QuantMethod]) -> None:
        """Other rows of the batch may hold anything: a row keeps its bits.

        If it fails: round activations by a scale per row; one for the whole batch lets requests see each other.
        """
        for linear, state in self.layers(method_class, torch.float32):
            x = torch.randn(6, linear.spec.in_features, generator=torch.Generator().manual_seed(0))
            loud = x.clone()
            loud[1:] *= 1e6
            assert torch.equal(linear.forward(x, state, None)[0], linear.forward(loud, state, None)[0])

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_deterministic_rows_do_not_see_how_many_there_are(
        self, method_class: type[QuantMethod], dtype: torch.dtype
    ) -> None:
        """With `LinearSpec.deterministic`, a row has the same bits in any batch.

        If it fails: multiply tiles of one fixed number of rows where the spec asks for it.
        """
        for linear, state in self.layers(method_class, dtype, deterministic=True):
            x = torch.randn(40, linear.spec.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            whole = linear.forward(x, state, None)
            for first, last in ((0, 1), (3, 20), (39, 40)):
                assert torch.equal(linear.forward(x[first:last], state, None), whole[first:last])


@cache
def _made(sample: Sample, inputs: int, outputs: int, seed: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """Samples are made bit by bit, which takes longer than a check."""
    return sample(inputs, outputs, seed)
