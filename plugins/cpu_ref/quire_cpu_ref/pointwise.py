"""Norms and activations, row by row."""

from __future__ import annotations

from collections.abc import Callable

from quire.plugin import GatedActSpec, RMSNormSpec, elementwise
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class TorchRMSNorm:
    """RMS norm (Zhang and Sennrich 2019) in float32, with the residual added first if there is one."""

    def __init__(self, spec: RMSNormSpec) -> None:
        self.spec = spec

    def __call__(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if residual is not None:
            x = residual = residual + x
        spec = self.spec
        if spec.weight_offset:
            normed = functional.rms_norm(x.float(), (spec.size,), None, spec.eps)
            return (normed * (weight.float() + spec.weight_offset)).to(x.dtype), residual
        # Given the weight, rms_norm would round once, behind the product; models round before it as well.
        normed = functional.rms_norm(x, (spec.size,), None, spec.eps) * weight
        return normed, residual


class TorchGatedAct:
    """Gate and value stand side by side in one tensor."""

    def __init__(self, spec: GatedActSpec) -> None:
        self._size = spec.size
        activation = _ACTIVATIONS[spec.activation]
        self._activation = (lambda gate: elementwise(activation, gate)) if spec.deterministic else activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._activation(x[..., : self._size]) * x[..., self._size :]
