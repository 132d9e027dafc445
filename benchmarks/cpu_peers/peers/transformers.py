"""transformers' model and cache in a loop of its own: `generate` without its overhead, in static batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpu_peers.protocol import Request, Unavailable

REQUIREMENTS: tuple[str, ...] = ("torch>=2.11", "transformers>=5.17")
BUILD: Mapping[str, str] = {}


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """Nothing to do in bf16, and no 4-bit weights on a CPU without a further package."""
    if precision == "int4":
        raise Unavailable("no 4-bit weights on a CPU by itself")
    return checkpoint


class Peer:
    """One batch at a time, of requests of one length."""

    skips: Mapping[str, str] = {"served": "serves no stream of requests"}

    def __init__(self, path: str, request: Request) -> None:
        import torch
        import transformers

        torch.set_num_threads(request.threads)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.vocab: int = self._model.config.vocab_size
        self.notes: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
        self._keys: list[str] = []
        self._prompts: list[Sequence[int]] = []
        self._left = 0
        self._cache: Any = None
        self._tokens: Any = None

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        self._keys.append(key)
        self._prompts.append(prompt)
        self._left = count

    def step(self) -> list[tuple[str, list[int]]]:
        torch = self._torch
        ids = torch.tensor(self._prompts) if self._cache is None else self._tokens
        with torch.inference_mode():
            output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        self._cache = output.past_key_values
        deltas = [(key, [token]) for key, [token] in zip(self._keys, self._tokens.tolist(), strict=True)]
        self._left -= 1
        if not self._left:
            self._keys, self._prompts, self._cache = [], [], None
        return deltas

    def busy(self) -> bool:
        return bool(self._keys)
