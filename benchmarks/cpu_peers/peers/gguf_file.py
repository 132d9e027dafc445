"""A checkpoint of Llama's or Qwen3's architecture as a GGUF file.

Token ids are all that passes through it; its vocabulary is made up, since llama.cpp's server does not run without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The GGUF name of a weight. Raises KeyError for one that these architectures do not have."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, index, part = stem.split(".", 3)
        return f"blk.{index}.{LAYER[part]}.weight"
    return f"{OUTER[stem]}.weight"


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection for llama.cpp's rotation of Llama, which pairs neighbours and not halves."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_bfloat16(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and bit patterns of the weights in a safetensors file. Raises ValueError unless they are bfloat16."""
    import numpy

    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is in {entry['dtype']}; this reads BF16")
        first, last = (start + offset for offset in entry["data_offsets"])
        yield name, data[first:last].view(numpy.uint16).reshape(entry["shape"])


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write matrices in bfloat16 and norms in float32."""
    import gguf
    import numpy

    config = json.loads((checkpoint / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(target, kind)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, config["vocab_size"])
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, bits in read_bfloat16(path):
            part = name.split(".")[-2]
            if kind == "llama" and part in heads:
                bits = interleaved(bits, heads[part])
            if bits.ndim == 1:
                writer.add_tensor(gguf_name(name), (bits.astype(numpy.uint32) << 16).view(numpy.float32))
            else:
                raw = numpy.ascontiguousarray(bits).view(numpy.uint8)
                writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, size: int) -> None:
    """A word for each token id, whole in itself: a server that puts characters together never waits for the next."""
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
