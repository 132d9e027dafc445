"""`quant_linear` on an NVIDIA GPU: codes of at most 8 bits times x in float16 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quire.plugin import GraphSupport, OpInit, OpSet, OpSpec, QuantLinearSpec, UnsupportedModel
from torch import Tensor
from torch.nn import functional

from quire_quant.cuda_kernels import dequantize_kernel, few_rows_kernel, more_rows_kernel
from quire_quant.cuda_launches import BLOCK_N, FUSED_ROWS, MIN_BLOCK_M, Launch, launch_for, split_for
from quire_quant.cuda_words import SEGMENT, TILE, Words, pack, unit_of

DTYPES = (torch.bfloat16, torch.float16)
SCRATCH_BYTES = 256 << 20
"""Memory for the part of a weight that is dequantized at once, for many rows."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What launches depend on. `native`: see `cuda_kernels`."""

    capability: tuple[int, int]
    num_multiprocessors: int
    native: bool


def gpu_of(device: torch.device) -> Gpu:
    """The device's; for the CPU, where kernels run in Triton's interpreter only, that of a small GPU."""
    if device.type != "cuda":
        return Gpu((9, 0), 4, native=False)
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count, native=True)


class CudaQuantOps(OpSet):
    """Triton kernels that read codes as they are."""

    kinds = frozenset({"quant_linear"})

    def __init__(self, init: OpInit) -> None:
        super().__init__(init)
        self._gpu = gpu_of(init.device)

    def why_not(self, spec: OpSpec) -> list[str]:
        reasons = super().why_not(spec)
        if not isinstance(spec, QuantLinearSpec):
            return reasons
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is not one of {sorted(map(str, DTYPES))}")
        if spec.zeros == "real":
            reasons.append("zero points must be whole numbers")
        if unit_of(spec.group_size, spec.in_features) is None:
            reasons.append(
                f"groups of {spec.group_size} in {spec.in_features} inputs: the group size must be a multiple of "
                f"{SEGMENT}, or all inputs one group"
            )
        return reasons

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        """Launches depend on the number of rows alone."""
        return GraphSupport.ANY

    def build(self, spec: OpSpec) -> Any:
        if not isinstance(spec, QuantLinearSpec):
            raise UnsupportedModel(f"operation {spec.kind!r} is not one of {sorted(self.kinds)}")
        return CudaQuantLinear(spec, self._gpu)


@dataclass(frozen=True, slots=True)
class State:
    """A packed layer, and counters for split inputs: zero between launches, and for one stream at a time."""

    words: Words
    counters: Tensor


class CudaQuantLinear:
    """`QuantLinearOp`: one of three ways by the number of rows; in the deterministic form always the second."""

    def __init__(self, spec: QuantLinearSpec, gpu: Gpu) -> None:
        self._spec, self._gpu = spec, gpu

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> State:
        words = pack(codes, scales, zeros, self._spec.bits, self._spec.group_size)
        tiles = (words.padded_outputs // BLOCK_N) * (FUSED_ROWS // MIN_BLOCK_M)
        return State(words, torch.zeros(tiles, dtype=torch.int32, device=codes.device))

    def __call__(self, x: Tensor, state: State, bias: Tensor | None = None) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        if self._spec.deterministic:
            launch = launch_for(MIN_BLOCK_M, state.words.bits, self._gpu.capability)
            # The split, too, is that of one block of rows, however many there are.
            split = self._split(launch, MIN_BLOCK_M, state.words)
            starts = range(0, max(len(x), 1), FUSED_ROWS)
            parts = [self._fused(x[start : start + FUSED_ROWS], state, bias, launch, split) for start in starts]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        if len(x) > FUSED_ROWS:
            return self._by_weight(x, state.words, bias)
        launch = launch_for(len(x), state.words.bits, self._gpu.capability)
        return self._fused(x, state, bias, launch, self._split(launch, len(x), state.words))

    def weight(self, state: State) -> Tensor:
        return self._dequantized(state.words, 0, state.words.out_features)

    def _split(self, launch: Launch, rows: int, words: Words) -> int:
        output_tiles = words.padded_outputs // BLOCK_N
        return split_for(launch, rows, output_tiles, words.num_tiles, self._gpu.num_multiprocessors)

    def _fused(self, x: Tensor, state: State, bias: Tensor | None, launch: Launch, split: int) -> Tensor:
        words, rows = state.words, len(x)
        out = x.new_empty(rows, words.out_features)
        if not rows:
            return out
        row_tiles, output_tiles = -(-rows // launch.block_m), words.padded_outputs // BLOCK_N
        kernel, grid, more = few_rows_kernel, (output_tiles, split, row_tiles), {}
        if not launch.few:
            kernel, grid, more = more_rows_kernel, (row_tiles, split, output_tiles), {"WIDE": launch.wide}
        kernel[grid](
            out,
            x,
            words.data,
            words.scales,
            words.zeros if words.zeros is not None else words.scales,
            bias if bias is not None else out,
            out.new_empty(split, rows, words.out_features, dtype=torch.float32) if split > 1 else out,
            state.counters,
            rows,
            words.out_features,
            words.in_features,
            words.padded_outputs,
            x.stride(0),
            words.num_tiles,
            -(-words.num_tiles // split),
            BIAS=bias is not None,
            RAGGED=words.in_features % TILE != 0,
            SPLIT=split,
            BLOCK_M=launch.block_m,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **self._constants(words),
            **more,
        )
        return out

    def _by_weight(self, x: Tensor, words: Words, bias: Tensor | None) -> Tensor:
        """For many rows: the weight is made in parts, which cuBLAS multiplies by."""
        step = max(BLOCK_N, SCRATCH_BYTES // (x.element_size() * words.in_features) // BLOCK_N * BLOCK_N)
        if words.out_features <= step:
            return functional.linear(x, self._dequantized(words, 0, words.out_features), bias)
        out = x.new_empty(len(x), words.out_features)
        for start in range(0, words.out_features, step):
            end = min(start + step, words.out_features)
            weight = self._dequantized(words, start, end)
            out[:, start:end] = functional.linear(x, weight, None if bias is None else bias[start:end])
        return out

    def _dequantized(self, words: Words, start: int, end: int) -> Tensor:
        """Rows of the weight; `start` is a multiple of BLOCK_N."""
        out = torch.empty(end - start, words.in_features, dtype=self._spec.dtype, device=words.data.device)
        dequantize_kernel[(-(-(end - start) // BLOCK_N), words.num_tiles)](
            out,
            words.data,
            words.scales,
            words.zeros if words.zeros is not None else words.scales,
            start,
            end - start,
            words.in_features,
            words.padded_outputs,
            **self._constants(words),
        )
        return out

    def _constants(self, words: Words) -> dict[str, Any]:
        """Compile-time arguments that all kernels have."""
        return {
            "BITS": words.bits,
            "OFFSET": 0 if words.bits == 8 else 128 if self._spec.dtype is torch.bfloat16 else 1024,
            "UNIT": words.unit,
            "MIDDLE": words.middle if words.zeros is None else -1,
            "NATIVE": self._gpu.native,
            "BLOCK_N": BLOCK_N,
        }
