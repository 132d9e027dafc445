"""Small random-weight checkpoints of real architectures, saved by transformers: oracles without downloads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quire.contract.model import ModelSpec

VOCAB = 320
"""256 bytes, a few special tokens, and room."""
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG: Mapping[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 24, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 6, "query_pre_attn_scalar": 24}),
    "phi3": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 128}),
    "olmo2": ("Olmo2", {}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "qk_layernorm": False, "partial_rotary_factor": 0.25}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25, "hidden_act": "gelu"}),
    "cohere2": ("Cohere2", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "olmoe": ("Olmoe", {"num_experts": 12, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "doge": ("Doge", {}),
    "diffllama": ("DiffLlama", {}),
}
"""Name -> (transformers' class prefix, settings beside COMMON)."""

BRIDGED = "olmo2"
"""What a spec is tried on that names no architecture, and is asked about any checkpoint."""


def architecture_of(spec: ModelSpec) -> str | None:
    """The first name of ARCHITECTURES whose class the spec serves, if there is one; a bridge serves any."""
    if not spec.architectures:
        return BRIDGED
    return next(
        (name for name, (prefix, _) in ARCHITECTURES.items() if f"{prefix}ForCausalLM" in spec.architectures), None
    )


def make_checkpoint(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random checkpoint of the named architecture; returns its folder.

    Every parameter is drawn anew, norms and biases too, so that none is at a value that hides its absence.
    """
    import transformers

    prefix, settings = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    # A copy: transformers rewrites nested settings.
    config = config_class(**copy.deepcopy(dict(COMMON) | dict(settings)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if parameter.ndim == 1 else 0.0
            spread = 0.2 if parameter.ndim == 1 else 1.5 / max(1, parameter.shape[-1]) ** 0.5
            parameter.copy_(centre + spread * noise)
    model.to(dtype).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose first ids are special and whose others are single bytes, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*specials, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def reference_model(folder: Path) -> Any:
    """The same checkpoint in transformers, float32, eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()
