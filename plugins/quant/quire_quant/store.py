"""Codes as checkpoints store them, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quire_quant.awq import ORDER, PER_WORD, columns
from quire_quant.bits import WORD, pack, unpack
from quire_quant.solve import Solution, Target

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def is_awq(method: str, target: Target) -> bool:
    """Whether the result is stored in AWQ's format; it has 4 bits only, and other results are stored in GPTQ's."""
    return method == "awq" and target.bits == 4


def fits(inputs: int, outputs: int, target: Target) -> bool:
    """Whether a layer of that size fills whole groups and words."""
    return inputs % target.group_size == 0 and inputs * target.bits % WORD == 0 and outputs * target.bits % WORD == 0


def stored(method: str, solution: Solution) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix."""
    scales = solution.scales.t().contiguous()
    codes, zeros = solution.codes.t(), solution.zeros.t()
    if is_awq(method, solution.target):
        return {"qweight": _pack_awq(codes), "qzeros": _pack_awq(zeros), "scales": scales}
    target = solution.target
    shifted = (zeros.int() - int(target.sym)) & target.largest
    return {
        "qweight": pack(codes, target.bits),
        "qzeros": pack(shifted.t(), target.bits).t().contiguous(),
        "scales": scales,
        "g_idx": torch.arange(len(codes), dtype=torch.int32) // target.group_size,
    }


def read(method: str, tensors: Mapping[str, Tensor], target: Target) -> Solution:
    """What `stored` wrote."""
    scales = tensors["scales"].t().contiguous()
    if is_awq(method, target):
        codes, zeros = columns(tensors["qweight"]), columns(tensors["qzeros"])
    else:
        codes = unpack(tensors["qweight"], target.bits, len(tensors["g_idx"]))
        zeros = unpack(tensors["qzeros"].t().contiguous(), target.bits, len(scales)).t()
        zeros = ((zeros.int() + int(target.sym)) & target.largest).to(torch.uint8)
    return Solution(target, codes.t().contiguous(), scales, zeros.t().contiguous())


def settings(method: str, target: Target, skipped: Sequence[str], damping: float) -> dict[str, Any]:
    """config.json's `quantization_config`; `skipped` are linear layers that stay as they were."""
    shared: dict[str, Any] = {"bits": target.bits, "group_size": target.group_size}
    if is_awq(method, target):
        skip = ["lm_head", *skipped]
        return {"quant_method": "awq", **shared, "zero_point": True, "version": "gemm", "modules_to_not_convert": skip}
    return {
        "quant_method": "gptq",
        **shared,
        "sym": target.sym,
        "desc_act": False,
        "static_groups": True,
        "lm_head": False,
        # Symmetric zero points are read everywhere in the first form; others only the second stores without a wrap.
        "checkpoint_format": "gptq" if target.sym else "gptq_v2",
        "pack_dtype": "int32",
        "damp_percent": damping,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
        "meta": {"quantizer": ["quire"], "method": method},
    }


def _pack_awq(codes: Tensor) -> Tensor:
    """[R, N] -> int32 [R, N / 8] in AWQ's order of columns."""
    ordered = codes.reshape(len(codes), -1, PER_WORD)[..., list(ORDER)].reshape(len(codes), -1)
    return pack(ordered.t(), 4).t().contiguous()
