"""Quire, through its public API, in the environment that runs the benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_peers.protocol import Request
from cpu_peers.workload import Point, capacity

REQUIREMENTS: tuple[str, ...] = ()
BUILD: Mapping[str, str] = {}
BLOCK = 16


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """Nothing to do: int4 is rounded while the checkpoint loads."""
    return checkpoint


class Peer:
    """`LLM` and the engine's own `add` and `step`."""

    skips: Mapping[str, str] = {}
    input_bits = 8

    def __init__(self, path: str, request: Request) -> None:
        from quire import LLM, SamplingParams, __version__  # isort: skip  # before torch, so that its threads sleep
        import torch

        torch.set_num_threads(request.threads)
        options = {"int4": {"input_bits": self.input_bits}} if request.precision == "int4" else {}
        self._llm = LLM(path, **settings(request), plugin_options=options)
        self._params = SamplingParams
        self._engine = self._llm.engine
        self.vocab = vocabulary(path)
        self.notes: dict[str, Any] = {
            "quire": __version__,
            "torch": torch.__version__,
            "selected": dict(self._engine.info().selected),
        }

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        params = self._params(temperature=0, max_tokens=count, ignore_eos=True)
        self._engine.add(self._engine.prepare(key, list(prompt), params))

    def step(self) -> list[tuple[str, list[int]]]:
        return [(delta.request_id, list(delta.token_ids)) for delta in self._engine.step()]

    def busy(self) -> bool:
        return self._engine.has_work()


def settings(request: Request) -> dict[str, Any]:
    """What the engine holds, and in which form."""
    need = capacity(map(Point.parse, request.points))
    return {
        "dtype": "bfloat16",
        "quantization": "int4" if request.precision == "int4" else None,
        "num_kv_blocks": need.tokens // BLOCK + 2 * need.sequences + 1,
        "max_num_seqs": need.sequences,
        "max_model_len": need.length,
        "block_size": BLOCK,
    }


def vocabulary(path: str) -> int:
    """Number of token ids of a checkpoint."""
    size: int = json.loads((Path(path) / "config.json").read_text())["vocab_size"]
    return size
