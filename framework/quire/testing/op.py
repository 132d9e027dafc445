"""Conformance of op sets: every kind against formulas in float64, row by row, and bitwise where promised."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from quire.contract.ops import (
    GatedActSpec,
    LinearSpec,
    MoESpec,
    OpInit,
    OpSet,
    OpSpec,
    QuantLinearSpec,
    RMSNormSpec,
    Zeros,
)
from quire.testing.placement import placed

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROWS = (0, 1, 2, 3, 7, 16, 17, 33, 130)
CODES = (
    (4, 32, "middle"),
    (4, 128, "integer"),
    (4, 24, "real"),
    (4, 192, "integer"),
    (3, 32, "integer"),
    (2, 96, "real"),
    (8, 128, "middle"),
    (8, 50, "integer"),
)
"""bits, group size and zeros of the quantized layers of 192 inputs that are tried; some groups are cut short."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Any] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": _gelu_tanh,
}


class OpConformance:
    """What every op set must hold, for the kinds that it lists. Subclass, and give the fixture `op_set`."""

    device = "cpu"

    @pytest.fixture
    def op_set(self) -> OpSet:
        """The set under test, constructed."""
        raise pytest.UsageError("define the fixture `op_set`")

    @staticmethod
    def init(device: str = "cpu") -> OpInit:
        return OpInit(torch.device(device), 256)

    def build(self, op_set: OpSet, spec: OpSpec) -> Any:
        reasons = op_set.why_not(spec)
        if reasons:
            pytest.skip("; ".join(reasons))
        op = op_set.build(spec)
        return op if self.device == "cpu" else _Placed(op, self.device)

    def close(self, ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    @pytest.mark.parametrize("rows", ROWS)
    def test_rms_norm(self, op_set: OpSet, rows: int, offset: float, dtype: torch.dtype) -> None:
        """Norm with and without a residual; the residual comes back as the sum.

        If it fails: add x to the residual first, in the compute dtype; norm in float32; the weight's offset is added
        before the product.
        """
        op = self.build(op_set, RMSNormSpec(40, 1e-5, dtype, offset))
        x, residual = (torch.randn(rows, 40, generator=_seeded(i)).to(dtype) for i in range(2))
        weight = torch.rand(40, generator=_seeded(2)).to(dtype)
        for extra in (None, residual):
            total = x if extra is None else (x + extra)
            wide = total.double()
            exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
            normed, kept = op(x.clone(), weight, None if extra is None else extra.clone())
            self.close(normed, exact, dtype)
            assert kept is None if extra is None else torch.equal(kept, total)

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("rows", ROWS)
    def test_gated_act(self, op_set: OpSet, rows: int, activation: Any, dtype: torch.dtype) -> None:
        """act(gate) · up, gate standing first.

        If it fails: the first `size` elements of a row are the gate; gelu_tanh is the approximation by tanh, gelu is
        exact.
        """
        op = self.build(op_set, GatedActSpec(37, activation, dtype))
        x = torch.randn(rows, 74, generator=_seeded(0)).to(dtype)
        self.close(op(x.clone()), ACTIVATIONS[activation](x[:, :37].double()) * x[:, 37:].double(), dtype)

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("rows", ROWS)
    def test_linear(self, op_set: OpSet, rows: int, deterministic: bool, bias: bool, dtype: torch.dtype) -> None:
        """x · Wᵀ + b, for any number of rows, contiguous or not.

        If it fails: look at zero rows, at rows with a stride, and at a bias that `pack` dropped.
        """
        op = self.build(op_set, LinearSpec(48, 70, bias, dtype, deterministic))
        weight = (torch.randn(70, 48, generator=_seeded(0)) / 7).to(dtype)
        offset = torch.randn(70, generator=_seeded(1)).to(dtype) if bias else None
        wide = torch.randn(rows, 96, generator=_seeded(2)).to(dtype)
        state = op.pack(weight.clone(), None if offset is None else offset.clone())
        for x in (wide[:, :48], wide[:, :48].contiguous()):
            exact = x.double() @ weight.double().T + (offset.double() if offset is not None else 0.0)
            self.close(op(x, state), exact, dtype)

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("outputs", [70, 96])
    @pytest.mark.parametrize("code", CODES, ids=str)
    def test_quant_linear(self, op_set: OpSet, code: tuple[int, int, Zeros], outputs: int, dtype: torch.dtype) -> None:
        """`weight` is what the codes mean, and rows, contiguous or not, are multiplied by it.

        If it fails: a weight is (code - zero) · scale of its group, the last group may be cut short, and without zeros
        the middle is 2**(bits - 1).
        """
        bits, group_size, kind = code
        self.check_codes(op_set, QuantLinearSpec(192, outputs, bits, group_size, kind, dtype))

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_quant_linear_whose_inputs_may_have_8_bits(self, op_set: OpSet, dtype: torch.dtype) -> None:
        """Such inputs are close enough to those given.

        If it fails: give each row and group of inputs a scale of its own, or keep all their bits, which is always
        right.
        """
        self.check_codes(op_set, QuantLinearSpec(192, 70, 4, 32, "middle", dtype, input_bits=8))

    def check_codes(self, op_set: OpSet, spec: QuantLinearSpec) -> None:
        """Compare the operation with the weight in float64."""
        outputs, dtype = spec.out_features, spec.dtype
        op, generator = self.build(op_set, spec), _seeded(spec.bits)
        codes, scales, zeros = quantized(spec, generator)
        state = op.pack(codes.clone(), scales.clone(), None if zeros is None else zeros.clone())
        weight = op.weight(state)
        self.close(weight, _meaning(spec, codes, scales, zeros), dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        for rows in ROWS:
            wide = torch.randn(rows, 200, generator=generator).to(dtype)
            for x in (wide[:, 3:195], wide[:, 3:195].contiguous()):
                exact = x.double() @ weight.double().T
                self.close(op(x, state), exact, dtype)
                self.close(op(x, state, bias), exact + bias.double(), dtype)

    @pytest.mark.parametrize("renormalize", [False, True])
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("rows", ROWS)
    def test_moe(self, op_set: OpSet, rows: int, deterministic: bool, renormalize: bool) -> None:
        """The chosen experts' outputs, weighted by their routing probabilities.

        If it fails: softmax over all experts first, then choose; divide by the chosen ones' sum only with
        `renormalize`.
        """
        spec = MoESpec(5, 2, 24, 20, renormalize, "silu", torch.float32, deterministic)
        op = self.build(op_set, spec)
        x, logits = torch.randn(rows, 24, generator=_seeded(0)), torch.randn(rows, 5, generator=_seeded(1)) * 2
        up, down = torch.randn(5, 40, 24, generator=_seeded(2)) / 5, torch.randn(5, 24, 20, generator=_seeded(3)) / 5
        exact = torch.zeros(rows, 24, dtype=torch.float64)
        for row in range(rows):
            chances = torch.softmax(logits[row].double(), 0)
            best = chances.argsort(descending=True)[:2].tolist()
            scale = sum(chances[e] for e in best) if renormalize else 1.0
            for e in best:
                both = up[e].double() @ x[row].double()
                hidden = ACTIVATIONS["silu"](both[:20]) * both[20:]
                exact[row] += chances[e] / scale * (down[e].double() @ hidden)
        self.close(op(x, logits, up, down), exact, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["linear", "quant_linear", "coarse quant_linear", "rms_norm", "gated_act"])
    def test_values_of_neighbours_do_not_matter(self, op_set: OpSet, kind: str, dtype: torch.dtype) -> None:
        """In a batch of one size a row's bits depend on that row alone, deterministic form or not; NaN and large values
        in other rows stay there.

        If it fails: take scales per row: one that is shared by the batch, as in some quantized kernels, lets requests
        see each other.
        """
        function = self.by_rows(op_set, kind, 64, dtype, deterministic=False)
        x = torch.randn(9, 64, generator=_seeded(0)).to(dtype)
        alone = function(x.clone())[4]
        for other in (0.0, 1e4, float("nan")):
            changed = torch.full_like(x, other)
            changed[4] = x[4]
            assert torch.equal(function(changed)[4], alone), f"{kind} sees {other} in other rows"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "kind", ["linear", "quant_linear", "coarse quant_linear", "rms_norm", "gated_act", "odd gated_act", "moe"]
    )
    def test_deterministic_forms_do_not_see_their_neighbours(
        self, op_set: OpSet, kind: str, dtype: torch.dtype
    ) -> None:
        """Bitwise the same row alone, in any batch, at any place; large layers too, where kernels change.

        If it fails: multiply tiles of one fixed number of rows, and use `quire.plugin.elementwise`; or refuse
        deterministic specs in `why_not`.
        """
        function = self.by_rows(op_set, kind, 3072, dtype, deterministic=True)
        x = torch.randn(100, 3072, generator=_seeded(0)).to(dtype)
        whole = function(x)
        for first, last in ((0, 1), (99, 100), (3, 5), (10, 27), (1, 98)):
            assert torch.equal(function(x[first:last].clone()), whole[first:last]), f"{kind} on {first}:{last}"

    def by_rows(self, op_set: OpSet, kind: str, size: int, dtype: torch.dtype, *, deterministic: bool) -> Any:
        """An operation of the kind as a function of x [T, size] alone; skips if the set does not serve it."""
        if kind == "rms_norm":
            norm = self.build(op_set, RMSNormSpec(size, 1e-6, dtype))
            scales = torch.rand(size, generator=_seeded(1)).to(dtype)
            return lambda x: norm(x, scales)[0]
        if kind == "gated_act":
            return self.build(op_set, GatedActSpec(size // 2, "silu", dtype, deterministic))
        if kind == "odd gated_act":
            odd = self.build(op_set, GatedActSpec(39, "gelu_tanh", dtype, deterministic))
            return lambda x: odd(x[:, :78])
        if kind == "moe":
            moe = self.build(op_set, MoESpec(4, 2, size, 41, True, "silu", dtype, deterministic))
            up = torch.randn(4, 82, size, generator=_seeded(3)).to(dtype) / 50
            down = torch.randn(4, size, 41, generator=_seeded(4)).to(dtype) / 50
            return lambda x: moe(x, x[:, :4].contiguous(), up, down)
        if kind.endswith("quant_linear"):
            input_bits: Literal[8, 16] = 8 if kind.startswith("coarse") else 16
            spec = QuantLinearSpec(size, 208, 4, 32, "integer", dtype, deterministic, input_bits=input_bits)
            quant = self.build(op_set, spec)
            packed = quant.pack(*quantized(spec, _seeded(5)))
            return lambda x: quant(x, packed)
        linear = self.build(op_set, LinearSpec(size, 200, True, dtype, deterministic))
        weight = torch.randn(200, size, generator=_seeded(1)).to(dtype)
        state = linear.pack(weight, torch.randn(200, generator=_seeded(2)).to(dtype))
        return lambda x: linear(x, state)


def quantized(spec: QuantLinearSpec, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes uint8 [N, K], scales and zeros float32 [N, G], of weights with a norm of about one per output."""
    top, groups = 1 << spec.bits, (spec.out_features, spec.num_groups)
    codes = torch.randint(0, top, (spec.out_features, spec.in_features), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(groups, generator=generator) + 0.5) / (top * spec.in_features**0.5)).half().float()
    zeros = torch.rand(groups, generator=generator) * (top - 1)
    return codes, scales, {"middle": None, "integer": zeros.round(), "real": zeros}[spec.zeros]


def _meaning(spec: QuantLinearSpec, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weight float64 [N, K] of codes."""
    group = torch.arange(spec.in_features) // spec.group_size
    middle = float(1 << (spec.bits - 1))
    shift = middle if zeros is None else zeros.double()[:, group]
    return (codes.double() - shift) * scales.double()[:, group]


class _Placed:
    """An operation of another device as one that takes and gives tensors of the CPU, where problems are made."""

    def __init__(self, op: Any, device: str) -> None:
        self._op, self._device = op, device

    def pack(self, *tensors: Tensor | None) -> Any:
        return self._op.pack(*placed(tensors, self._device))

    def weight(self, state: Any) -> Any:
        return placed(self._op.weight(state), "cpu")

    def __call__(self, *arguments: Any) -> Any:
        moved = [placed(item, self._device) if isinstance(item, Tensor) else item for item in arguments]
        return placed(self._op(*moved), "cpu")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
