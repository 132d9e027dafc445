"""What a model takes of a machine's memory, from its configuration and the headers of its files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from quire.contract.attention import KV_DTYPES, AttentionBackend
from quire.loader.files import StoredTensor
from quire.registry import AUTO
from quire.resolve import ResolvedConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_A_LAYER = re.compile(r"\.\d+\.")
UNQUANTIZED = ("gate", "norm")
"""Ends of the paths of matrices within layers that no method quantizes: routers, and norms that look like one."""


@dataclass(frozen=True, slots=True)
class Form:
    """A quantized form: bits of a code, bytes of a scale, whether there are packed zero points and an index of groups.

    Attributes:
        methods: what makes or reads it.
        head_bits: of the output head, which stands beside an embedding that it is tied to; 0: it stays as it is. Op
            sets that hold 6 bits in bytes take more.
    """

    methods: str
    bits: int
    scale_bytes: int
    has_zeros: bool
    head_bits: int = 0

    def num_bytes(self, outputs: int, inputs: int, group_size: int) -> int | None:
        """Of a layer; None if groups and words of 32 bits do not divide it, so that it stays as it is."""
        groups = inputs // group_size
        if inputs % group_size or inputs * self.bits % 32 or (self.has_zeros and outputs * self.bits % 32):
            return None
        zeros = groups * outputs * self.bits // 8 + 4 * inputs if self.has_zeros else 0
        return inputs * outputs * self.bits // 8 + groups * outputs * self.scale_bytes + zeros

    def of_tensor(self, tensor: StoredTensor, group_size: int) -> int | None:
        """As `num_bytes`, of a matrix or of a stack of them; a group_size of -1 stands for all inputs."""
        *stacked, outputs, inputs = tensor.shape
        size = self.num_bytes(outputs, inputs, inputs if group_size == -1 else group_size)
        return None if size is None else size * math.prod(stacked)


FORMS = (
    Form("int8 at load", 8, 4, False, head_bits=8),
    Form("int4 at load", 4, 4, False, head_bits=6),
    Form("gptq", 8, 2, True),
    Form("gptq, awq", 4, 2, True),
    Form("gptq", 3, 2, True),
    Form("gptq", 2, 2, True),
)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Weights in one form.

    Attributes:
        form: such as `bfloat16` or `4 bits`. methods: what makes it. num_bytes: of all weights.
        fits: whether the free memory holds them and the least KV pool.
        kv_tokens: tokens whose keys and values fit into the largest pool that Quire makes by itself.
        requests: requests of the greatest length that those are.
    """

    form: str
    methods: str
    num_bytes: int
    fits: bool
    kv_tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Keys and values in one dtype: bytes of a token, and of a request of the greatest length."""

    dtype: str
    bytes_per_token: int
    bytes_per_request: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What `quire plan` says. Bytes throughout; `parameters` is None for a checkpoint that is quantized already."""

    model: str
    parameters: int | None
    max_model_len: int
    device: str
    memory_total: int
    memory_free: int
    compute_dtype: str
    weights: tuple[WeightPlan, ...]
    kv: tuple[KVPlan, ...]


def make_plan(config: ResolvedConfig, group_size: int) -> Plan:
    """Plan for the device that is configured.

    Args:
        group_size: inputs that share a scale in the quantized forms.
    """
    memory = config.device.memory()
    tensors, quantized = config.checkpoint.tensors, bool(config.checkpoint.quantization_config)
    kv, cached = _bytes_per_token(config), config.config.kv_cache_dtype

    def weights(form: str, methods: str, size: int, dtype: torch.dtype) -> WeightPlan:
        pool = int(max(0, memory.free - size) * memory.kv_share)
        tokens = pool // kv[_named(dtype) if cached == AUTO else cached]
        fits = tokens >= 2 * config.block_size
        return WeightPlan(form, methods, size, fits, tokens if fits else 0, tokens // config.max_model_len)

    return Plan(
        model=config.checkpoint.name,
        parameters=None if quantized else sum(math.prod(tensor.shape) for tensor in tensors.values()),
        max_model_len=config.max_model_len,
        device=str(config.device.torch_device()),
        memory_total=memory.total,
        memory_free=memory.free,
        compute_dtype=_named(config.dtype),
        weights=tuple(weights(*row) for row in _forms(config, group_size)),
        kv=tuple(KVPlan(dtype, size, size * config.max_model_len) for dtype, size in kv.items()),
    )


def _forms(config: ResolvedConfig, group_size: int) -> Iterator[tuple[str, str, int, torch.dtype]]:
    """(form, methods, bytes of all weights, compute dtype)."""
    tensors = config.checkpoint.tensors
    stored = config.checkpoint.quantization_config
    if stored:
        yield "as stored", str(config.checkpoint.quant_method), config.checkpoint.num_bytes, config.dtype
        return
    for dtype in DTYPES:
        yield _named(dtype), "", sum(math.prod(t.shape) * dtype.itemsize for t in tensors.values()), dtype
    for form in FORMS:
        size = _quantized_bytes(tensors, form, group_size, config.dtype.itemsize)
        yield f"{form.bits} bits", form.methods, size, config.dtype


def _quantized_bytes(tensors: Mapping[str, StoredTensor], form: Form, group_size: int, itemsize: int) -> int:
    total = 0
    for name, tensor in tensors.items():
        size = form.of_tensor(tensor, group_size) if is_linear(name, tensor) else None
        total += math.prod(tensor.shape) * itemsize if size is None else size
    return total + (_rounded_head(tensors, form, group_size, itemsize) if form.head_bits else 0)


def _rounded_head(tensors: Mapping[str, StoredTensor], form: Form, group_size: int, itemsize: int) -> int:
    """Bytes that an output head in `form.head_bits` adds: takes, if it is the embedding, which is needed beside it."""
    for end, is_own in (("lm_head.weight", True), ("embed_tokens.weight", False)):
        for name, tensor in tensors.items():
            if name.endswith(end):
                size = replace(form, bits=form.head_bits).of_tensor(tensor, group_size)
                return 0 if size is None else size - is_own * math.prod(tensor.shape) * itemsize
    return 0


def is_linear(name: str, tensor: StoredTensor) -> bool:
    """Whether it is a matrix of a decoder layer, or a stack of experts' matrices, that methods quantize."""
    path, _, last = name.rpartition(".")
    inside = last == "weight" or "experts" in name
    return inside and len(tensor.shape) in (2, 3) and bool(IN_A_LAYER.search(name)) and not path.endswith(UNQUANTIZED)


def _bytes_per_token(config: ResolvedConfig) -> dict[str, int]:
    """By dtype of the cache, over all layers, as the chosen attention backend lays its caches out."""
    backend: type[AttentionBackend] = config.selected["attention"].target
    dtypes = {_named(dtype): dtype for dtype in DTYPES}
    dtypes |= {name: dtype for name, dtype in KV_DTYPES.items() if name in backend.caps.kv_dtypes}
    layers = config.spec.attention_layers(config.model_config)

    def size(dtype: torch.dtype) -> int:
        specs = [spec for layer in layers for spec in backend.kv_spec(layer, config.block_size, dtype)]
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs) // config.block_size

    return {name: size(dtype) for name, dtype in dtypes.items()}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
