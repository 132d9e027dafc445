"""Norms and gated activations in one launch each; linears and experts stay with torch's op set."""

from __future__ import annotations

from typing import Any

import torch
import triton
from quire.plugin import GatedActSpec, GraphSupport, OpSet, OpSpec, RMSNormSpec, UnsupportedModel
from torch import Tensor

from quire_cuda_paged.row_kernels import gated_act_kernel, rms_norm_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_NORM_SIZE = 32768
"""A row of this length is held in one program's registers."""
ACT_BLOCK = 1024


class CudaOps(OpSet):
    """Every row is computed by itself, so all forms are deterministic."""

    kinds = frozenset({"rms_norm", "gated_act"})

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        return GraphSupport.ANY

    def why_not(self, spec: OpSpec) -> list[str]:
        reasons = super().why_not(spec)
        if isinstance(spec, RMSNormSpec) and spec.size > MAX_NORM_SIZE:
            reasons.append(f"norms over more than {MAX_NORM_SIZE} elements are not supported; this one has {spec.size}")
        if isinstance(spec, RMSNormSpec | GatedActSpec) and spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is not one of {sorted(map(str, DTYPES))}")
        return reasons

    def build(self, spec: OpSpec) -> Any:
        if isinstance(spec, RMSNormSpec):
            return FusedRMSNorm(spec)
        if isinstance(spec, GatedActSpec):
            return FusedGatedAct(spec)
        raise UnsupportedModel(f"operation {spec.kind!r} is not one of {sorted(self.kinds)}")


class FusedRMSNorm:
    """`RMSNormOp`; the sum takes the residual's place in memory."""

    def __init__(self, spec: RMSNormSpec) -> None:
        self._spec = spec
        self._block = int(triton.next_power_of_2(spec.size))

    def __call__(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = _rows(x)
        residual = _rows(residual) if residual is not None else None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.shape[0]:
            rms_norm_kernel[(x.shape[0],)](
                out,
                x,
                weight,
                residual if residual is not None else x,
                x.stride(0),
                residual.stride(0) if residual is not None else 0,
                self._spec.eps,
                self._spec.weight_offset,
                SIZE=self._spec.size,
                BLOCK=self._block,
                RESIDUAL=residual is not None,
                OFFSET=self._spec.weight_offset != 0.0,
                num_warps=_num_warps(self._block),
            )
        return out, residual


class FusedGatedAct:
    """`GatedActOp`."""

    def __init__(self, spec: GatedActSpec) -> None:
        self._spec = spec

    def __call__(self, x: Tensor) -> Tensor:
        x, size = _rows(x), self._spec.size
        out = torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device)
        if x.shape[0]:
            gated_act_kernel[(x.shape[0], triton.cdiv(size, ACT_BLOCK))](
                out, x, x.stride(0), SIZE=size, BLOCK=ACT_BLOCK, ACTIVATION=self._spec.activation, num_warps=4
            )
        return out


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _num_warps(block: int) -> int:
    """About 16 elements for each thread."""
    return min(16, max(1, block // 512))
