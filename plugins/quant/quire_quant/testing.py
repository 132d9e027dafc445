"""For tests: layers and checkpoints in GPTQ's and AWQ's forms.

Written field by field with Python's integers, so that no reader is its own oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quire.testing.tiny_models import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
LINEARS = ("_proj.weight", "lm_head.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def stream(values: Sequence[int], bits: int) -> list[int]:
    """Integers -> the words of their bit stream, by Python's own integers."""
    whole = sum(int(value) << (bits * index) for index, value in enumerate(values))
    return [_signed(whole >> (32 * index)) for index in range(-(-len(values) * bits // 32))]


def pack_down(codes: Tensor, bits: int) -> Tensor:
    """[K, N] -> int32 [K * bits / 32, N]."""
    return torch.tensor([stream(column, bits) for column in codes.t().tolist()], dtype=torch.int32).t().contiguous()


def pack_along(codes: Tensor, bits: int) -> Tensor:
    """[G, N] -> int32 [G, N * bits / 32]."""
    return torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)


def pack_awq(codes: Tensor) -> Tensor:
    """[R, N] -> int32 [R, N / 8]."""
    rows = codes.view(len(codes), -1, 8)[..., list(AWQ_COLUMNS)].reshape(len(codes), -1)
    return pack_along(rows, 4)


@dataclass
class Layer:
    """codes and zeros [K, N] and [G, N], scales [G, N], g_idx [K]; the weight [N, K] that they mean, float64."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def weight(self) -> Tensor:
        """What the fields mean."""
        shifted = self.codes.double() - self.zeros.double()[self.g_idx]
        return (shifted * self.scales.double()[self.g_idx]).t()


def random_layer(
    inputs: int,
    outputs: int,
    bits: int,
    group_size: int,
    *,
    sym: bool = False,
    act_order: bool = False,
    seed: int = 0,
) -> Layer:
    """Random codes; groups of inputs that stand together, or not."""
    generator = torch.Generator().manual_seed(seed)
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 1 << bits, (groups, outputs), generator=generator)
    if sym:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    else:
        zeros[0, 0] = 0  # the case in which the first form must wrap within its field
    scales = (torch.rand(groups, outputs, generator=generator) * 0.2 + 0.05) / (1 << bits)
    g_idx = torch.arange(inputs) // size
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return Layer(codes, zeros, scales.half(), g_idx)


def gptq_tensors(layer: Layer, bits: int, *, v2: bool = False, with_g_idx: bool = True) -> dict[str, Tensor]:
    """As GPTQ stores them."""
    zeros = layer.zeros if v2 else (layer.zeros - 1) % (1 << bits)
    tensors = {
        "qweight": pack_down(layer.codes, bits),
        "qzeros": pack_along(zeros, bits),
        "scales": layer.scales,
    }
    return tensors | ({"g_idx": layer.g_idx.int()} if with_g_idx else {})


def awq_tensors(layer: Layer) -> dict[str, Tensor]:
    """As AWQ's gemm layout stores them."""
    return {"qweight": pack_awq(layer.codes), "qzeros": pack_awq(layer.zeros), "scales": layer.scales}


def gemv_tensors(layer: Layer, group_size: int) -> dict[str, Tensor]:
    """As AWQ's gemv layout stores them."""
    groups = len(layer.scales)
    multiple = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    filled = (groups + 7) // 8
    words = (filled + multiple - 1) // multiple * multiple
    zeros = torch.zeros(layer.scales.shape[1], words * 8, dtype=torch.int64)
    scales = torch.zeros(layer.scales.shape[1], words * 8, dtype=torch.float16)
    zeros[:, :groups], scales[:, :groups] = layer.zeros.t(), layer.scales.t()
    return {"qweight": pack_along(layer.codes.t(), 4), "qzeros": pack_along(zeros, 4), "scales": scales}


def gptq_sample(inputs: int, outputs: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer of 4 bits in groups of 128 for the conformance kit."""
    layer = random_layer(inputs, outputs, 4, 128, seed=seed)
    return gptq_tensors(layer, 4), layer.weight


def awq_sample(inputs: int, outputs: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same in AWQ's gemm layout."""
    layer = random_layer(inputs, outputs, 4, 128, seed=seed)
    return awq_tensors(layer), layer.weight


def compressed_sample(inputs: int, outputs: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same as compressed-tensors packs it."""
    layer = random_layer(inputs, outputs, 4, 128, seed=seed)
    return compressed_tensors(layer, 4), layer.weight


def fp8_sample(inputs: int, outputs: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A float8 layer with a scale for each output."""
    return fp8_tensors(inputs, outputs, (outputs, 1), seed=seed)


Quantize = Callable[[str, int, int], "tuple[Mapping[str, Tensor], Tensor] | None"]


def quantized_checkpoint(
    architecture: str, folder: Path, quantize: Quantize, settings: Mapping[str, Any], *, file_name: str | None = None
) -> tuple[Path, Path]:
    """A checkpoint whose projections `quantize(name, inputs, outputs)` makes: (tensors, weight), or None.

    Returns (its folder, the folder of the same model with the weights dequantized).
    """
    plain = make_checkpoint(architecture, folder / "plain")
    made = make_checkpoint(architecture, folder / "quantized")
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in list(tensors.items()):
        layer = name.removesuffix(".weight")
        result = quantize(layer, tensor.shape[1], tensor.shape[0]) if name.endswith(LINEARS) else None
        if result is None:
            stored[name] = tensor
            continue
        stored |= {f"{layer}.{suffix}": value.contiguous() for suffix, value in result[0].items()}
        tensors[name] = result[1].float().contiguous()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, made / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    if file_name is None:
        (made / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    else:
        (made / file_name).write_text(json.dumps(settings))
    return made, plain


def compressed_tensors(layer: Layer, bits: int, *, sym: bool = False, g_idx: bool = False) -> dict[str, Tensor]:
    """As compressed-tensors' pack-quantized stores them: the transpose of GPTQ's, zero points as they are."""
    stored = {
        "weight_packed": pack_along(layer.codes.t(), bits),
        "weight_scale": layer.scales.t().contiguous(),
        "weight_shape": torch.tensor([layer.codes.shape[1], layer.codes.shape[0]]),
    }
    if not sym:
        stored["weight_zero_point"] = pack_down(layer.zeros.t(), bits)
    return stored | ({"weight_g_idx": layer.g_idx.int()} if g_idx else {})


def fp8_tensors(
    inputs: int, outputs: int, scale_shape: tuple[int, ...], *, block: int = 128, name: str = "weight_scale", seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A random float8 weight with scales of that shape: (tensors, the weight [N, K] that they mean, float64)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape, generator=generator) * 0.05 + 0.01
    if scale.numel() == 1:
        wide = scale.view(1, 1).expand(outputs, inputs)
    elif outputs in scale_shape and scale.numel() == outputs:
        wide = scale.view(outputs, 1).expand(outputs, inputs)
    else:
        wide = scale.repeat_interleave(block, 0)[:outputs].repeat_interleave(block, 1)[:, :inputs]
    return {"weight": weight, name: scale}, weight.double() * wide.double()
