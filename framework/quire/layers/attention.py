"""The attention block: fused projection, optional head norms, rotary embedding, paged attention, output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.contract.attention import AttentionLayer, HeadNorm, QKVStep
from quire.contract.model import ModelInit, StepContext
from quire.layers.linear import Linear, Source
from quire.layers.weights import WeightTable


@dataclass(frozen=True, slots=True)
class AttentionNames:
    """Checkpoint paths of one attention block; `qkv` has one entry if the checkpoint fuses it already."""

    qkv: tuple[str, ...]
    out: str
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True, slots=True)
class AttentionStyle:
    """What differs between families."""

    hidden_size: int
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0


class Attention:
    """One layer's attention."""

    def __init__(
        self,
        init: ModelInit,
        table: WeightTable,
        layer: AttentionLayer,
        names: AttentionNames,
        style: AttentionStyle,
    ) -> None:
        self.layer = layer
        sizes = (
            layer.num_heads * layer.head_dim,
            layer.num_kv_heads * layer.head_dim,
            layer.num_kv_heads * layer.v_head_dim,
        )
        parts = zip(names.qkv, sizes if len(names.qkv) > 1 else (sum(sizes),), strict=True)
        sources = [Source(name, size) for name, size in parts]
        self._qkv = Linear(init, table, sources, style.hidden_size, bias=style.qkv_bias)
        inner = layer.num_heads * layer.v_head_dim
        self._out = Linear(init, table, [Source(names.out, style.hidden_size)], inner, bias=style.out_bias)
        self._q_norm: HeadNorm | None = None
        self._k_norm: HeadNorm | None = None
        for name, attribute in ((names.q_norm, "_q_norm"), (names.k_norm, "_k_norm")):
            if name is not None:
                self._expect_norm(init, table, name, attribute, style)

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], ctx: StepContext, wanted: Tensor | None = None
    ) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size], or of the R tokens `wanted` [R, hidden_size].

        `rotary` is cos and sin at the tokens' positions.
        """
        step = QKVStep(
            layer=self.layer,
            qkv=self._qkv(x),
            cos=rotary[0],
            sin=rotary[1],
            kv=ctx.kv[self.layer.layer_id],
            batch=ctx.batch,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
        )
        attended = ctx.attend_qkv(step)
        return self._out(attended if wanted is None else attended.index_select(0, wanted))

    def _expect_norm(
        self, init: ModelInit, table: WeightTable, name: str, attribute: str, style: AttentionStyle
    ) -> None:
        def take(tensor: Tensor) -> None:
            weight = tensor.to(init.device, init.dtype, copy=True)
            setattr(self, attribute, HeadNorm(weight, style.norm_eps, style.norm_offset))

        table.expect(f"{name}.weight", (self.layer.head_dim,), take)
