"""What precedes attention in a layer, in one launch: head norms, rotation, the write to the cache."""

from __future__ import annotations

import torch
import triton
from quire.plugin import HeadNorm, QKVStep, split_qkv
from torch import Tensor

from quire_cuda_paged.row_kernels import prepare_qkv_kernel

TILE = 8
"""Heads per program: enough work for its threads, and enough programs when there is one token."""


def can_fuse(step: QKVStep) -> bool:
    """Whether the kernel can read and write these tensors: the elements of a row, and a slot's heads, lie together."""
    read_along_rows = all(tensor.stride(-1) == 1 for tensor in (step.qkv, step.cos, step.sin) if tensor.numel())
    return read_along_rows and all(cache.is_contiguous() for cache in step.kv)


def fused_prepare_qkv(step: QKVStep) -> tuple[Tensor, Tensor, Tensor]:
    """As `AttentionBackend.prepare_qkv`; `can_fuse(step)` must hold. v is a view of the projection."""
    layer, qkv = step.layer, step.qkv
    num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
    turned = torch.empty(qkv.shape[0], num_heads + num_kv_heads, layer.head_dim, dtype=qkv.dtype, device=qkv.device)
    keys, values = step.kv
    tiles = triton.cdiv(num_heads, TILE) + 2 * triton.cdiv(num_kv_heads, TILE)
    prepare_qkv_kernel[(qkv.shape[0], tiles)](
        turned,
        qkv,
        step.cos,
        step.sin,
        *(norm.weight if norm is not None else qkv for norm in (step.q_norm, step.k_norm)),
        keys,
        values,
        step.batch.slot_mapping,
        qkv.stride(0),
        step.cos.stride(0),
        step.sin.stride(0),
        keys.stride(1),
        values.stride(1),
        *(norm.eps if norm is not None else 0.0 for norm in (step.q_norm, step.k_norm)),
        *(norm.weight_offset if norm is not None else 0.0 for norm in (step.q_norm, step.k_norm)),
        *(1 / scale for scale in layer.cache_scales(keys.dtype)),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        D=layer.head_dim,
        D_PAD=int(triton.next_power_of_2(layer.head_dim)),
        DV=layer.v_head_dim,
        DV_PAD=int(triton.next_power_of_2(layer.v_head_dim)),
        HALF=step.cos.shape[-1],
        NEOX=step.rotary_style == "neox",
        Q_NORM=_norm_kind(step.q_norm),
        K_NORM=_norm_kind(step.k_norm),
        TILE=TILE,
        LARGEST=torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else 0.0,
        num_warps=4,
    )
    return turned[:, :num_heads], turned[:, num_heads:], split_qkv(step)[2]


def _norm_kind(norm: HeadNorm | None) -> int:
    """As the kernel knows it: 0 none, 1 plain, 2 with an offset on the weight."""
    if norm is None:
        return 0
    return 2 if norm.weight_offset else 1
