"""The bridge: any decoder that transformers can run, with its attention routed through our backends.

The model is transformers' own. Its attention calls arrive through transformers' attention registry;
tokens of all requests lie side by side in one row, `[1, T]`, and the backend keeps them apart.
Some architectures drop extra keyword arguments on the way, so the step's context travels in a
variable that is set for the duration of one forward pass, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quire.contract.attention import AttentionLayer
from quire.contract.model import CausalLM, ModelInit, ModelSpec, StepContext
from quire.errors import UnsupportedModel
from quire.layers.weights import WeightTable

NAME = "quire"
UNSUPPORTED_KEYS = {
    "is_encoder_decoder": "it is an encoder-decoder model",
    "vision_config": "it is a multimodal model",
    "audio_config": "it is a multimodal model",
    "add_cross_attention": "it uses cross-attention",
    "alibi": "it uses ALiBi positions",
    "ssm_cfg": "it has state-space layers",
    "mamba_d_state": "it has state-space layers",
    "quantization_config": "its weights are quantized",
    "kv_lora_rank": "it uses multi-head latent attention",
}
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward pass: its context, and the layers by transformers' index."""

    ctx: StepContext
    layers: tuple[AttentionLayer, ...]


_step: ContextVar[_Step] = ContextVar("quire_bridge_step")


def why_not(config: Mapping[str, Any]) -> list[str]:
    """Reasons why the bridge cannot serve a config.json."""
    reasons = [reason for key, reason in UNSUPPORTED_KEYS.items() if config.get(key)]
    if other := sorted(set(config.get("layer_types") or ()) - PLAIN_LAYERS):
        reasons.append(f"it has layers of type {other}")
    if reasons:
        return list(dict.fromkeys(reasons))
    try:
        model = _empty_model(dict(config))
    except Exception as error:  # transformers raises many kinds for what it does not know
        return [f"transformers cannot build it: {error}"]
    if not getattr(model, "_supports_attention_backend", False):
        return ["its code in transformers has an attention of its own, not the replaceable one"]
    return []


def config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json itself: transformers reads it."""
    return dict(config)


def attention_layers(config: Mapping[str, Any]) -> tuple[AttentionLayer, ...]:
    """The layers that transformers' model will call attention for."""
    return _layers(_empty_model(config))


def _layers(model: Any) -> tuple[AttentionLayer, ...]:
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    found = {
        module.layer_idx: module for module in modules if hasattr(module, "scaling") or hasattr(module, "head_dim")
    }
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return tuple(
        AttentionLayer(
            layer_id=index,
            num_heads=heads,
            num_kv_heads=heads // int(getattr(module, "num_key_value_groups", 1)),
            head_dim=(size := int(getattr(module, "head_dim", None) or module.head_size)),
            v_head_dim=size,
            scale=float(getattr(module, "scaling", size**-0.5)),
            sliding_window=getattr(module, "sliding_window", None),
        )
        for index, module in sorted(found.items())
    )


class BridgedModel(CausalLM):
    """transformers' model behind our interface."""

    def __init__(self, init: ModelInit) -> None:
        super().__init__()
        _register()
        if init.deterministic:
            raise UnsupportedModel(
                "deterministic results need a native model; this one runs through transformers",
                remedy="leave deterministic off",
            )
        self._init = init
        self._model = _empty_model(init.config)
        self.attention_layers = _layers(self._model)
        self.vocab_size = int(self._model.config.get_text_config().vocab_size)
        self._table = WeightTable()
        self._renamings = _renamings(self._model)
        tied = self._tied_names()
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            take = self._taker(name)
            self._table.expect(name, tuple(parameter.shape), take, required=name not in tied)
        persistent = set(self._model.state_dict(keep_vars=True))
        for name, buffer in self._model.named_buffers():
            if name in persistent:
                self._table.expect(name, tuple(buffer.shape), self._taker(name))

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        token = _step.set(_Step(ctx, self.attention_layers))
        try:
            base = self._model.base_model
            result = base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        finally:
            _step.reset(token)
        hidden: Tensor = result.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits.float()

    def load_weight(self, name: str, tensor: Tensor) -> bool:
        if name.endswith((".inv_freq", ".attention.bias", ".masked_bias")):
            return True  # derived tables that old checkpoints carry along
        return self._table.load(name, tensor) or self._table.load(self._renamed(name), tensor)

    def missing_weights(self) -> list[str]:
        return self._table.missing()

    def finalize(self) -> None:
        self._model.tie_weights()
        self._fill_buffers()
        self._model.eval()

    def _renamed(self, name: str) -> str:
        """The name that transformers gives a tensor which the checkpoint stores under an older one."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, self._renamings, [])[0]
        return renamed

    def _taker(self, name: str) -> Any:
        owner_name, _, attribute = name.rpartition(".")
        owner = self._model.get_submodule(owner_name)

        def take(tensor: Tensor) -> None:
            dtype = self._init.dtype if tensor.is_floating_point() else tensor.dtype
            placed = tensor.to(self._init.device, dtype, copy=True)
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(placed, requires_grad=False)
            else:
                owner._buffers[attribute] = placed

        return take

    def _tied_names(self) -> set[str]:
        """Parameters that are other ones once more, and need not be stored."""
        if not self._model.config.get_text_config().tie_word_embeddings:
            return set()
        return set(getattr(self._model, "_tied_weights_keys", None) or ())

    def _fill_buffers(self) -> None:
        """Derived buffers (rotary frequencies) are not stored; a second model, not empty, computes them."""
        real = _real_buffers(self._model)
        for name, buffer in list(self._model.named_buffers()):
            if buffer.is_meta:
                owner_name, _, attribute = name.rpartition(".")
                self._model.get_submodule(owner_name)._buffers[attribute] = real[name].to(self._init.device)


def _renamings(model: Any) -> list[Any]:
    """How transformers renames this architecture's stored tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]


def _real_buffers(model: Any) -> dict[str, Tensor]:
    """The buffers that a model of the same configuration computes when it is built."""
    import copy

    fresh = _without_weights(type(model), copy.deepcopy(model.config))
    return dict(fresh.named_buffers())


def _without_weights(kind: Any, config: Any) -> Any:
    """Build with parameters on the meta device and buffers in memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        meta = None if param is None else nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, meta)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        return kind(config)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _empty_model(config: Mapping[str, Any]) -> Any:
    """transformers' model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    settings = AutoConfig.for_model(str(config.get("model_type")), **values)
    _register()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, attn_implementation=NAME, trust_remote_code=False)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D], not repeated -> [1, T, Hq, D]."""
    step = _step.get()
    layer = step.layers[int(cast(int, module.layer_idx))]
    if softcap is not None or s_aux is not None or (scaling is not None and abs(scaling - layer.scale) > 1e-6):
        raise UnsupportedModel(f"layer {layer.layer_id} asks for a softcap, sinks or scale that was not declared")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    ctx = step.ctx
    ctx.backend.write_kv(layer, k, v, ctx.kv[layer.layer_id], ctx.batch)
    return ctx.attend(layer, q, k, v).view(1, q.shape[0], layer.num_heads, -1), None


SPEC = ModelSpec(
    architectures=frozenset(),
    config_from_hf=config_from_hf,
    attention_layers=attention_layers,
    max_model_len=lambda config: int(config["max_position_embeddings"]),
    vocab_size=lambda config: int(config["vocab_size"]),
    build=BridgedModel,
    why_not=why_not,
)
