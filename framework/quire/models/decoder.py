"""The decoder that every native family is a setting of.

A layer is norm, attention, norm, MLP around a residual stream; Gemma adds a norm behind attention and
MLP. Sums with the residual are left to the next norm, which takes both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.contract.attention import AttentionLayer, GraphSupport
from quire.contract.model import CausalLM, ModelInit, ModelSpec, StepContext
from quire.contract.ops import Activation, elementwise
from quire.layers.attention import Attention, AttentionNames, AttentionStyle
from quire.layers.basic import Embedding, GatedMLP, Head, RMSNorm
from quire.layers.kv_scales import KVScales
from quire.layers.linear import Source
from quire.layers.moe import ExpertNames, ExpertSizes, QuantizedSparseMLP, sparse_mlp
from quire.layers.rotary import RopeConfig, Rotary
from quire.layers.weights import WeightTable


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's settings.

    Attributes:
        windows: sliding window of each layer; None: it sees everything. As long as the layers.
        ropes: rotary settings by name. rope_of_layer: which of them each layer uses.
        qk_norm: RMS norm on each query and key head.
        norm_offset: constant added to norm weights (Gemma).
        embedding_scale: factor on embeddings (Gemma).
        sandwich_norms: norms behind attention and MLP too (Gemma).
        fused_names: the checkpoint stores qkv_proj and gate_up_proj (Phi-3).
        experts: sizes of expert layers. sparse_layers: which layers have experts.
        expert_names: `mixtral` or `qwen`, how the checkpoint names experts.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: Activation
    tied: bool
    ropes: Mapping[str, RopeConfig]
    rope_of_layer: tuple[str, ...]
    windows: tuple[int | None, ...]
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    sandwich_norms: bool = False
    fused_names: bool = False
    experts: ExpertSizes | None = None
    sparse_layers: frozenset[int] = frozenset()
    expert_names: str = "qwen"


def attention_layers(config: DecoderConfig) -> tuple[AttentionLayer, ...]:
    """The attention layers of such a decoder."""
    return tuple(
        AttentionLayer(
            layer_id=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            scale=config.scale,
            sliding_window=window,
            logit_softcap=config.attention_softcap,
        )
        for index, window in enumerate(config.windows)
    )


class Decoder(CausalLM):
    """See the module's docstring."""

    def __init__(self, init: ModelInit) -> None:
        super().__init__()
        config: DecoderConfig = init.config
        self.attention_layers = attention_layers(config)
        self.vocab_size = config.vocab_size
        self._config = config
        self._deterministic = init.deterministic
        self._table = table = WeightTable()
        self._kv_scales = KVScales()
        self._embedding = Embedding(init, table, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._ropes = {name: Rotary(rope, init.max_model_len, init.device) for name, rope in config.ropes.items()}
        self._layers = [DecoderLayer(init, table, layer) for layer in self.attention_layers]
        self.graph = min((layer.graph for layer in self._layers), default=GraphSupport.ANY)
        self._norm = RMSNorm(init, table, "model.norm", config.hidden_size, config.norm_eps, config.norm_offset)
        sizes = (config.vocab_size, config.hidden_size)
        self._head = Head(init, table, self._embedding, sizes, tied=config.tied)
        scale = config.embedding_scale
        # Rounded to the compute dtype first, as the checkpoints were trained.
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=init.dtype))

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        rotary = {name: rope.at(positions) for name, rope in self._ropes.items()}
        x = self._embedding(input_ids)
        if self._scale is not None:
            x = x * self._scale
        residual: Tensor | None = None
        for layer, rope in zip(self._layers, self._config.rope_of_layer, strict=True):
            # Behind the last layer's keys and values nothing depends on the tokens that nobody will read.
            wanted = ctx.wanted if layer is self._layers[-1] else None
            x, residual = layer(x, residual, rotary[rope], ctx, wanted)
        return self._norm(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        cap = self._config.final_softcap
        if cap is None:
            return logits
        logits = logits.float()
        capped = elementwise(torch.tanh, logits / cap) if self._deterministic else torch.tanh(logits / cap)
        return capped * cap

    def load_weight(self, name: str, tensor: Tensor) -> bool:
        if self._config.expert_names == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")  # as transformers 5 names it in its own format
        # Derived tables that old checkpoints carry along.
        is_derived = name.endswith("rotary_emb.inv_freq")
        return is_derived or self._table.load(name, tensor) or self._kv_scales.load(name, tensor)

    def missing_weights(self) -> list[str]:
        return self._table.missing()

    def finalize(self) -> None:
        self._table.finish()
        self._head.finalize()
        self.attention_layers = self._kv_scales.applied(self.attention_layers)
        for layer, facts in zip(self._layers, self.attention_layers, strict=True):
            layer.attention.layer = facts


class DecoderLayer:
    """One layer. Takes and returns (output of the last block, residual stream without it); of the tokens `wanted`."""

    def __init__(self, init: ModelInit, table: WeightTable, layer: AttentionLayer) -> None:
        config: DecoderConfig = init.config
        prefix = f"model.layers.{layer.layer_id}"

        def norm(name: str) -> RMSNorm:
            return RMSNorm(init, table, f"{prefix}.{name}", config.hidden_size, config.norm_eps, config.norm_offset)

        self._input_norm = norm("input_layernorm")
        self.attention = _attention(init, table, layer, f"{prefix}.self_attn")
        self._after_attention: RMSNorm | None = None
        self._after_mlp: RMSNorm | None = None
        if config.sandwich_norms:
            self._after_attention = norm("post_attention_layernorm")
            self._mlp_norm = norm("pre_feedforward_layernorm")
            self._after_mlp = norm("post_feedforward_layernorm")
        else:
            self._mlp_norm = norm("post_attention_layernorm")
        self._mlp = _mlp(init, table, layer.layer_id, prefix)
        self.graph = GraphSupport.NEVER if isinstance(self._mlp, QuantizedSparseMLP) else GraphSupport.ANY

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        ctx: StepContext,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if residual is None:
            normed, residual = self._input_norm(x)[0], x
        else:
            normed, residual = self._input_norm(x, residual)
        x = self.attention(normed, rotary, ctx, wanted)
        if wanted is not None:
            assert residual is not None
            residual = residual.index_select(0, wanted)
        if self._after_attention is not None:
            x = self._after_attention(x)[0]
        x, residual = self._mlp_norm(x, residual)
        x = self._mlp(x)
        if self._after_mlp is not None:
            x = self._after_mlp(x)[0]
        return x, residual


def _attention(init: ModelInit, table: WeightTable, layer: AttentionLayer, prefix: str) -> Attention:
    config: DecoderConfig = init.config
    names = AttentionNames(
        qkv=(f"{prefix}.qkv_proj",)
        if config.fused_names
        else (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"),
        out=f"{prefix}.o_proj",
        q_norm=f"{prefix}.q_norm" if config.qk_norm else None,
        k_norm=f"{prefix}.k_norm" if config.qk_norm else None,
    )
    style = AttentionStyle(config.hidden_size, config.qkv_bias, config.out_bias, config.norm_eps, config.norm_offset)
    return Attention(init, table, layer, names, style)


def _mlp(init: ModelInit, table: WeightTable, index: int, prefix: str) -> Callable[[Tensor], Tensor]:
    config: DecoderConfig = init.config
    if config.experts is not None and index in config.sparse_layers:
        return sparse_mlp(init, table, _expert_names(config.expert_names, prefix), config.experts)
    inner = config.intermediate_size
    if config.fused_names:
        gate_up = [Source(f"{prefix}.mlp.gate_up_proj", 2 * inner)]
    else:
        gate_up = [Source(f"{prefix}.mlp.gate_proj", inner), Source(f"{prefix}.mlp.up_proj", inner)]
    sizes = (config.hidden_size, inner)
    return GatedMLP(init, table, gate_up, f"{prefix}.mlp.down_proj", sizes, config.activation, bias=config.mlp_bias)


def _expert_names(style: str, prefix: str) -> ExpertNames:
    if style == "mixtral":
        block = f"{prefix}.block_sparse_moe"
        return ExpertNames(
            router=f"{block}.gate",
            gate=f"{block}.experts.{{e}}.w1",
            up=f"{block}.experts.{{e}}.w3",
            down=f"{block}.experts.{{e}}.w2",
            stacked=f"{block}.experts",
        )
    block = f"{prefix}.mlp"
    expert = f"{block}.experts.{{e}}"
    return ExpertNames(
        router=f"{block}.gate",
        gate=f"{expert}.gate_proj",
        up=f"{expert}.up_proj",
        down=f"{expert}.down_proj",
        stacked=f"{block}.experts",
    )


def decoder_spec(
    architectures: frozenset[str], config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
) -> ModelSpec:
    """The model spec of a family."""
    return ModelSpec(
        architectures=architectures,
        config_from_hf=config_from_hf,
        attention_layers=attention_layers,
        max_model_len=lambda config: config.max_positions,
        vocab_size=lambda config: config.vocab_size,
        build=Decoder,
    )
