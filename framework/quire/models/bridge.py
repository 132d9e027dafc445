"""The bridge: any decoder that transformers can run, with its attention routed through our backends.

The model is transformers' own. Its attention calls arrive through transformers' attention registry;
tokens of all requests lie side by side in one row, `[1, T]`, and the backend keeps them apart. What
cannot be served this way is refused by name: from the config, or when the loaded model is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quire.contract.attention import AttentionLayer
from quire.contract.model import CausalLM, ModelInit, ModelSpec, StepContext
from quire.errors import UnsupportedModel
from quire.layers.kv_scales import KVScales
from quire.models.bridge_attention import NAME, PagedStep, layers_of, register, running
from quire.models.bridge_check import check_model
from quire.models.bridge_weights import BridgeWeights, fill_buffers

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


def why_not(config: Mapping[str, Any]) -> list[str]:
    """Reasons why the bridge cannot serve a config.json."""
    reasons = [reason for key, reason in UNSUPPORTED_KEYS.items() if config.get(key)]
    if other := sorted(set(config.get("layer_types") or ()) - PLAIN_LAYERS):
        reasons.append(f"it has layers of type {other}")
    if reasons:
        return list(dict.fromkeys(reasons))
    try:
        model = _empty_model(config)
    except Exception as error:  # transformers raises many kinds for what it does not know
        return [f"transformers cannot build it: {error}"]
    return _why_not_built(model)


def _why_not_built(model: Any) -> list[str]:
    if not model._can_set_attn_implementation():
        return ["its code in transformers has an attention of its own, not the replaceable one"]
    if _decoder(model) is model or model.get_output_embeddings() is None:
        return ["its output head cannot be told from its layers"]
    if any(name.endswith((".sinks", ".sink")) for name, _ in model.named_parameters()):
        return ["its layers have attention sinks"]
    try:
        layers_of(model)
        _max_model_len(model.config)
    except UnsupportedModel as error:
        return [error.message]
    return []


def config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json itself: transformers reads it."""
    return dict(config)


def attention_layers(config: Mapping[str, Any]) -> tuple[AttentionLayer, ...]:
    """The layers that transformers' model will call attention for."""
    return layers_of(_empty_model(config))


class _Output:
    """Hidden states in the form in which a base model hands them to its head; all else it reads is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class BridgedModel(CausalLM):
    """transformers' model behind our interface."""

    def __init__(self, init: ModelInit) -> None:
        super().__init__()
        if init.deterministic:
            raise UnsupportedModel(
                "deterministic results need a native model; this one runs through transformers",
                remedy="leave deterministic off",
            )
        self._init = init
        self._model = _empty_model(init.config)
        self.attention_layers = layers_of(self._model)
        self.vocab_size = int(self._model.config.get_text_config().vocab_size)
        self._weights = BridgeWeights(init, self._model)
        self._kv_scales = KVScales()
        decoder = _decoder(self._model)
        self._decode = decoder.forward
        self._hidden: Tensor | None = None
        decoder.forward = self._forward_or_hidden

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        with running(PagedStep(ctx, self.attention_layers)):
            return self._run(input_ids, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        # Heads scale, cap or transform what they are given; the model's own code does that, on our states.
        self._hidden = hidden[None]
        try:
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        finally:
            self._hidden = None
        return logits

    def load_weight(self, name: str, tensor: Tensor) -> bool:
        return self._kv_scales.load(name, tensor) or self._weights.load(name, tensor)

    def missing_weights(self) -> list[str]:
        return self._weights.missing()

    def finalize(self) -> None:
        self.attention_layers = self._kv_scales.applied(self.attention_layers)
        self._model.tie_weights()
        fill_buffers(self._model, self._init.device)
        self._model.eval()
        check_model(self.attention_layers, self._run, self.logits, self.vocab_size, self._init.device)

    def _run(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        decoder = _decoder(self._model)
        result = decoder(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=True)
        hidden: Tensor = result.last_hidden_state[0]
        return hidden

    def _forward_or_hidden(self, *args: Any, **kwargs: Any) -> Any:
        return self._decode(*args, **kwargs) if self._hidden is None else _Output(self._hidden)


def _decoder(model: Any) -> Any:
    """The part that the head calls: the layers with what stands around them."""
    decoder = model.get_decoder()
    # Some architectures call their output projection a decoder.
    has_layers = decoder is not None and any(hasattr(module, "layer_idx") for module in decoder.modules())
    return decoder if has_layers else model.base_model


def _empty_model(config: Mapping[str, Any]) -> Any:
    """transformers' model on the meta device."""
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_hf_config(config), attn_implementation=NAME, trust_remote_code=False)


def _hf_config(config: Mapping[str, Any]) -> Any:
    """transformers' reading of config.json, on a copy: it rewrites nested settings."""
    import copy

    from transformers import AutoConfig

    values = {key: copy.deepcopy(value) for key, value in config.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(str(config.get("model_type")), **values)


def _max_model_len(config: Any) -> int:
    """Positions that the config allows; older architectures have their own names for it."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UnsupportedModel("its config does not say how many positions it was made for")
    return length


SPEC = ModelSpec(
    architectures=frozenset(),
    config_from_hf=config_from_hf,
    attention_layers=attention_layers,
    max_model_len=lambda config: _max_model_len(_hf_config(config)),
    vocab_size=lambda config: int(_hf_config(config).get_text_config().vocab_size),
    build=BridgedModel,
    why_not=why_not,
)
