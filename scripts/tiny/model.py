"""The architecture of quire-tiny: Qwen3, small enough to ship."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny.tokenizer import VOCAB_SIZE

MAX_POSITIONS = 2048


def build_model(seed: int, eos_token_id: int, pad_token_id: int) -> Qwen3ForCausalLM:
    """A freshly initialised model of about 2.5 million parameters, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Qwen3ForCausalLM(config)
