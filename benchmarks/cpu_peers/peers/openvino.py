"""OpenVINO: exported by optimum-intel, run by openvino-genai's continuous batching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_peers.protocol import Request
from cpu_peers.workload import Point, capacity

REQUIREMENTS: tuple[str, ...] = (
    "torch>=2.11",
    "optimum-intel[openvino]",
    "nncf",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
)
BUILD: Mapping[str, str] = {}
UNWANTED = ("torchvision",)
"""Text models do not need it, and where it was built for another torch, transformers fails to import."""


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """Export once per precision; 4 bits are symmetric in groups of 32, head and embedding in 8 by default."""
    target = Path(folder) / precision
    if target.exists():
        return str(target)
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    four = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        compile=False,
        load_in_8bit=False,
        quantization_config=four if precision == "int4" else None,
    )
    model.save_pretrained(partial)
    _export_tokenizer(AutoTokenizer.from_pretrained(checkpoint), partial)
    partial.rename(target)
    return str(target)


def _export_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The pipeline asks for one, although only token ids pass through it here."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    for name, model in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
    ):
        openvino.save_model(model, folder / f"openvino_{name}.xml")


class Peer:
    """`ContinuousBatchingPipeline`, with a KV cache in bfloat16, or float32 where the CPU does not compute in that."""

    skips: Mapping[str, str] = {}

    def __init__(self, path: str, request: Request) -> None:
        import numpy
        import openvino
        import openvino_genai as genai

        need = capacity(map(Point.parse, request.points))
        config = json.loads((Path(path) / "config.json").read_text())
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = need.tokens // 16 + 2 * need.sequences
        scheduler.max_num_seqs = need.sequences
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        dtype = "bf16" if able else "f32"
        settings = {
            "INFERENCE_NUM_THREADS": request.threads,
            "INFERENCE_PRECISION_HINT": dtype,
            "KV_CACHE_PRECISION": dtype,
        }
        self._pipe = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", settings)
        self._genai, self._numpy, self._tensor = genai, numpy, openvino.Tensor
        self.vocab: int = config["vocab_size"]
        self.notes: dict[str, Any] = {"openvino": openvino.__version__, "settings": settings}
        self._handles: dict[str, Any] = {}
        self._left: dict[str, int] = {}
        self._count = 0

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        config = self._genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        ids = self._tensor(self._numpy.array([prompt], dtype=self._numpy.int64))
        self._count += 1
        self._handles[key] = self._pipe.add_request(self._count, ids, config)
        self._left[key] = count

    def step(self) -> list[tuple[str, list[int]]]:
        self._pipe.step()
        deltas = []
        for key, handle in list(self._handles.items()):
            if not handle.can_read():
                continue
            tokens = [token for output in handle.read().values() for token in output.generated_ids]
            deltas.append((key, tokens))
            self._left[key] -= len(tokens)
            if self._left[key] <= 0:
                del self._handles[key], self._left[key]
        return deltas

    def busy(self) -> bool:
        return bool(self._handles)
