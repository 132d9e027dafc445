"""Conformance of quantization methods: `forward` is multiplication by what `dequantize` returns, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.contract.ops import LinearSpec, OpSpec, QuantLinearSpec
from quire.contract.quant import QuantInit, QuantLinear, QuantMethod

ROWS = (0, 1, 3, 16, 17, 130)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class ReferenceQuantLinear:
    """`quant_linear` by its definition: the weight is kept whole, each row is multiplied in float64, alone."""

    def __init__(self, spec: QuantLinearSpec) -> None:
        self.spec = spec

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        group = torch.arange(self.spec.in_features) // self.spec.group_size
        shift = float(1 << (self.spec.bits - 1)) if zeros is None else zeros[:, group]
        return ((codes.float() - shift) * scales[:, group]).to(self.spec.dtype)

    def __call__(self, x: Tensor, state: Tensor, bias: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], self.spec.out_features)
        for row, values in enumerate(x.double()):
            out[row] = (state.double() * values).sum(-1).to(x.dtype)
        return out if bias is None else out + bias

    def weight(self, state: Tensor) -> Tensor:
        return state


def reference_op(spec: OpSpec) -> ReferenceQuantLinear:
    """What methods under test multiply with: `QuantInit.op`. Kernels are tested by their own op sets' kit."""
    assert isinstance(spec, QuantLinearSpec)
    return ReferenceQuantLinear(spec)


class QuantizationConformance:
    """What every method must hold. Subclass, and give `method` and `stored`."""

    shapes: Sequence[tuple[int, int]] = ((256, 96), (384, 1), (128, 1500))
    """(in_features, out_features) to try; layers that the method leaves unquantized are skipped."""

    @pytest.fixture
    def method_class(self) -> type[QuantMethod]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `method_class`")

    def init(self, dtype: torch.dtype) -> QuantInit:
        """What the method is made from; override for methods that read a checkpoint's configuration."""
        return QuantInit({}, {}, torch.device("cpu"), dtype, op=reference_op)

    def stored(self, linear: QuantLinear, seed: int) -> Mapping[str, Tensor]:
        """A layer's tensors as a checkpoint would hold them; override for packed formats."""
        generator = torch.Generator().manual_seed(seed)
        return {t.name: torch.randn(t.shape, generator=generator).to(t.dtype) for t in linear.tensors()}

    def make(self, method_class: type[QuantMethod], spec: LinearSpec) -> QuantLinear:
        linear = method_class(self.init(spec.dtype)).linear(spec, (spec,))
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

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("rows", ROWS)
    def test_forward_multiplies_by_the_dequantized_weight(
        self, method_class: type[QuantMethod], rows: int, dtype: torch.dtype
    ) -> None:
        """For any number of rows, contiguous or not, with and without bias."""
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
        """Concatenating q, k and v before finalizing gives the rows of each finalized alone."""
        parts = [LinearSpec(256, size, False, torch.float32, name=f"m.{size}") for size in (96, 32, 32)]
        fused = replace(parts[0], out_features=160, name="m.fused")
        joint = method_class(self.init(torch.float32)).linear(fused, tuple(parts))
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

    def test_neighbours_values_do_not_matter(self, method_class: type[QuantMethod]) -> None:
        """Other rows of the batch may hold anything: a row keeps its bits. Shared activation scales would fail."""
        for linear, state in self.layers(method_class, torch.float32):
            x = torch.randn(6, linear.spec.in_features, generator=torch.Generator().manual_seed(0))
            loud = x.clone()
            loud[1:] *= 1e6
            assert torch.equal(linear.forward(x, state, None)[0], linear.forward(loud, state, None)[0])

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_deterministic_rows_do_not_see_how_many_there_are(
        self, method_class: type[QuantMethod], dtype: torch.dtype
    ) -> None:
        """With `LinearSpec.deterministic`, a row has the same bits in any batch."""
        for linear, state in self.layers(method_class, dtype, deterministic=True):
            x = torch.randn(40, linear.spec.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            whole = linear.forward(x, state, None)
            for first, last in ((0, 1), (3, 20), (39, 40)):
                assert torch.equal(linear.forward(x[first:last], state, None), whole[first:last])
