"""Operations that a device may have better kernels for: a frozen spec in, a callable out.

A layer states what it needs as a spec and gets back an implementation of the matching protocol; it
never learns whose. Plain torch serves every spec, so a new device starts with attention alone.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quire.contract.attention import GraphSupport

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """Base of all specs; `kind` is the name under which users override the implementation (`ops.KIND`)."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class RMSNormSpec(OpSpec):
    """x / rms(x) · (weight + offset) over the last dimension `size`, computed in float32.

    `weight_offset` is 1 for Gemma, whose product is also taken in float32; elsewhere the normed
    value is rounded to the compute dtype before the product, as in transformers.
    """

    kind: ClassVar[str] = "rms_norm"
    size: int
    eps: float
    dtype: torch.dtype
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class GatedActSpec(OpSpec):
    """act(x[..., :size]) · x[..., size:] of x [T, 2·size]; `deterministic` as in `LinearSpec`."""

    kind: ClassVar[str] = "gated_act"
    size: int
    activation: Activation
    dtype: torch.dtype
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class LinearSpec(OpSpec):
    """y = x · weightᵀ + bias, weight [out_features, in_features].

    `deterministic`: a row's result must not depend on how many rows stand beside it.
    `name` is the layer's path in the model, for reports.
    """

    kind: ClassVar[str] = "linear"
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    deterministic: bool = False
    name: str = ""


Zeros = Literal["middle", "integer", "real"]


@dataclass(frozen=True, slots=True)
class QuantLinearSpec(OpSpec):
    """y = x · Wᵀ + bias, W[n, k] = (codes[n, k] - zeros[n, k // group_size]) · scales[n, k // group_size].

    Attributes:
        in_features: K. out_features: N.
        bits: codes lie in [0, 2**bits); at most 8.
        group_size: inputs that share a scale and a zero; the last group may be cut short.
        zeros: `middle`: all are 2**(bits - 1); `integer`: whole numbers in [0, 2**bits); `real`: any.
        dtype: of x and of the result.
        deterministic: as in `LinearSpec`. name: as there.
        input_bits: 8: the weights are coarse enough that x may be rounded to whole numbers of 8 bits, a scale for each
            row and group of inputs. 16: not to fewer than its dtype has. More bits than these are always right.
    """

    kind: ClassVar[str] = "quant_linear"
    in_features: int
    out_features: int
    bits: int
    group_size: int
    zeros: Zeros
    dtype: torch.dtype
    deterministic: bool = False
    name: str = ""
    input_bits: Literal[8, 16] = 16

    @property
    def num_groups(self) -> int:
        """G, groups of one output's weights."""
        return -(-self.in_features // self.group_size)


@dataclass(frozen=True, slots=True)
class MoESpec(OpSpec):
    """Gated experts over tokens routed to `top_k` of `num_experts`.

    `renormalize`: the chosen experts' softmax weights are scaled to sum to one.
    """

    kind: ClassVar[str] = "moe"
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    renormalize: bool
    activation: Activation
    dtype: torch.dtype
    deterministic: bool = False


ELEMENTWISE_TILE = 16384
"""Elements that `elementwise` computes at once: whole vectors, and too few to be split among threads."""


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of each element of x, every one computed by the vectorised path, wherever it stands.

    Elementwise kernels compute what is left over at the end of a tensor, or of a thread's share of it,
    by scalar code whose exp and tanh may differ in the last bit. Fixed, padded tiles leave nothing over.
    """
    flat = x.reshape(-1)
    out = torch.empty_like(flat)
    tile = torch.zeros(ELEMENTWISE_TILE, dtype=x.dtype, device=x.device)
    for start in range(0, flat.numel(), ELEMENTWISE_TILE):
        piece = flat[start : start + ELEMENTWISE_TILE]
        tile[: piece.numel()] = piece
        out[start : start + ELEMENTWISE_TILE] = function(tile)[: piece.numel()]
    return out.view(x.shape)


def mixture(
    x: Tensor, router_logits: Tensor, top_k: int, *, renormalize: bool, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Experts' outputs, weighted by their probabilities: a softmax over all of them, of which the `top_k` best count.

    Outputs are summed in the order of a token's choices, so that the order of experts cannot matter. Which experts
    are chosen is read back by the host: not for captured graphs.

    Args:
        x: [T, H]. router_logits: [T, E]. renormalize: weights of the chosen are scaled to sum to one.
        expert: (its number, rows [R, H] of x) -> [R, H]; called once for each that is chosen at all.
    """
    weights, experts = functional.softmax(router_logits.float(), -1).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype)
    outputs = x.new_zeros(x.shape[0], top_k, x.shape[1])
    for number in sorted(set(experts.flatten().tolist())):
        tokens, choices = (experts == number).nonzero(as_tuple=True)
        outputs[tokens, choices] = expert(number, x[tokens]) * weights[tokens, choices, None]
    total = outputs[:, 0]
    for choice in range(1, top_k):
        total = total + outputs[:, choice]
    return total


WIDENED_ROWS = 4
"""Rows from which on `torch_linear` goes through float32; fewer are read faster as they are."""
WIDENED_ELEMENTS = 1 << 20
"""Elements of the weight that it widens at once: a few MB, which the cache holds."""


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] · weight [N, K]ᵀ + bias [N], as `torch.nn.functional.linear`, and fast in half precision on any CPU.

    On a processor without instructions for bfloat16 or float16 torch multiplies them by plain loops. There the
    weight is widened to float32 some rows at a time: with 64 rows of 1024 inputs 5.5 times as fast on Zen 3.
    """
    if x.shape[0] < WIDENED_ROWS or _has_kernels(x.device.type, x.dtype):
        return functional.linear(x, weight, bias)
    out, wide = x.new_empty(x.shape[0], weight.shape[0]), x.float()
    step = max(16, WIDENED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        end = start + step
        part = None if bias is None else bias[start:end].float()
        out[:, start:end] = functional.linear(wide, weight[start:end].float(), part)
    return out


@cache
def _has_kernels(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return True  # not measured elsewhere: torch's own choice stands
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operations = torch.ops.mkldnn
    native = operations._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else operations._is_mkldnn_fp16_supported
    return bool(native())


class RMSNormOp(Protocol):
    """`(x [T, size], weight [size], residual)` -> (normed, new residual).

    With a residual: residual + x is taken first (in the compute dtype), normed, and returned as the
    second result. Without: the second result is None. Inputs may be overwritten.
    """

    def __call__(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...


class GatedActOp(Protocol):
    """`x [T, 2·size]` -> [T, size]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LinearOp(Protocol):
    """Packs a weight once, then multiplies."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Any:
        """The state that `__call__` takes; may alias `weight`, which the caller then lets go."""
        ...

    def __call__(self, x: Tensor, state: Any) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""
        ...


class QuantLinearOp(Protocol):
    """Packs codes once, then multiplies. What each checkpoint's format stores is the caller's business."""

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Any:
        """The state that `__call__` takes.

        Args:
            codes: uint8 [N, K]. scales: float32 [N, G].
            zeros: float32 [N, G], None if and only if the spec says `middle`.
        """
        ...

    def __call__(self, x: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, K], contiguous or not -> [T, N]; a row's result must not depend on its neighbours' values."""
        ...

    def weight(self, state: Any) -> Tensor:
        """The weight [N, K] that `__call__` multiplies by, in the spec's dtype."""
        ...


class MoEOp(Protocol):
    """`(x [T, H], router_logits [T, E], gate_up [E, 2I, H], down [E, H, I])` -> [T, H]; gate stands first."""

    def __call__(self, x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class OpInit:
    """All that an op set is constructed from; `options` is the validated instance of `Provider.options`."""

    device: torch.device
    max_num_tokens: int
    options: Any = None


class OpSet(ABC):
    """A family of operation kernels, for one or more kinds of spec."""

    kinds: ClassVar[frozenset[str]]

    def __init__(self, init: OpInit) -> None:
        self.init = init

    def why_not(self, spec: OpSpec) -> list[str]:
        """Reasons why this spec cannot be served; empty if it can."""
        return [] if spec.kind in self.kinds else [f"operation {spec.kind!r} is not one of {sorted(self.kinds)}"]

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        """Which batches the implementation of this spec can serve inside a captured graph.

        There it may not ask the device for a value, nor choose shapes by values. On a CPU, where what is captured
        are operations of torch, it may not compute by other means, unless the device knows them. The default says
        never.
        """
        return GraphSupport.NEVER

    @abstractmethod
    def build(self, spec: OpSpec) -> Any:
        """The implementation, following the protocol of the spec's kind."""
