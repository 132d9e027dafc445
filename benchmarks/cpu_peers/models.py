"""Random weights in real shapes; `python -m cpu_peers.models NAME FOLDER`, in Quire's environment, makes some."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": {
        "kind": "Qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
    },
    "llama-3.2-1b": {
        "kind": "Llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500_000.0,
    },
    "tiny": {
        "kind": "Qwen3",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_theta": 10_000.0,
    },
}
"""Name -> transformers' configuration. `tiny` is for trying the benchmark out; Llama's rope is not scaled."""


def make(name: str, folder: Path) -> None:
    """Save seeded random bfloat16 weights, with a head tied to the embedding, and a byte-level tokenizer."""
    import torch
    import transformers
    from quire.testing.tiny_models import save_byte_tokenizer

    shape = dict(SHAPES[name])
    config_class = getattr(transformers, f"{shape.pop('kind')}Config")
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    config = config_class(**shape, rope_parameters=rope, max_position_embeddings=4096, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (parameter for parameter in layer.parameters() if parameter.ndim == 2):
                # Else the tied head finds the embedding of the last token, and all peers agree whatever they compute.
                weight.mul_(1.5 / weight.shape[1] ** 0.5 / config.initializer_range)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
