"""llama.cpp, built from source by llama-cpp-python for this machine, and driven through `llama_decode`.

For the served workload the loop below batches continuously, rows of running requests first, prompts in the room that
is left: what the library can do where no server is in the way. With its own server it is `llama_server`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_peers.protocol import Request
from cpu_peers.workload import Point, capacity

REQUIREMENTS: tuple[str, ...] = ("llama-cpp-python", "gguf", "numpy")
BUILD: Mapping[str, str] = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
BATCH = 2048
"""Tokens of one call."""


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """GGUF files, of 4 bits by the library."""
    return converted(checkpoint, folder, precision, _quantize)


def converted(checkpoint: str, folder: str, precision: str, quantize: Callable[[Path, Path], None]) -> str:
    """A GGUF file in bfloat16; llama.cpp itself makes Q4_0 of it, with its default of Q6_K for a tied head."""
    from cpu_peers.peers.gguf_file import write_gguf

    source = Path(folder) / "bf16.gguf"
    if not source.exists():
        partial = source.with_suffix(".partial")
        write_gguf(Path(checkpoint), partial)
        partial.rename(source)
    if precision == "bf16":
        return str(source)
    target = Path(folder) / "int4.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        quantize(source, partial)
        partial.rename(target)
    return str(target)


def _quantize(source: Path, target: Path) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status:
        raise RuntimeError(f"llama_model_quantize ended with status {status}")


@dataclass(slots=True)
class _Sequence:
    """A request in a slot: `pending` tokens are not computed yet, `left` are to be made."""

    key: str
    pending: list[int]
    left: int
    computed: int = 0


@dataclass(slots=True)
class _Row:
    """One token of a call."""

    slot: int
    token: int
    position: int
    last: bool


@dataclass(slots=True)
class Slots:
    """Which requests run: continuous batching over a fixed number of slots."""

    size: int
    waiting: list[_Sequence] = field(default_factory=list)
    running: dict[int, _Sequence] = field(default_factory=dict)

    def rows(self, room: int) -> list[_Row]:
        """The next call's tokens, at most `room`: running requests first, then prompts, a long one in pieces."""
        for slot in range(self.size):
            if slot not in self.running and self.waiting:
                self.running[slot] = self.waiting.pop(0)
        result: list[_Row] = []
        for slot, sequence in sorted(self.running.items(), key=lambda item: len(item[1].pending)):
            taken, sequence.pending = (
                sequence.pending[: room - len(result)],
                sequence.pending[room - len(result) :],
            )
            for index, token in enumerate(taken):
                last = not sequence.pending and index == len(taken) - 1
                result.append(_Row(slot, token, sequence.computed + index, last))
            sequence.computed += len(taken)
        return result

    def take(self, slot: int, token: int) -> tuple[str, bool]:
        """A new token of a slot; returns its request's key, and whether it has ended."""
        sequence = self.running[slot]
        sequence.left -= 1
        sequence.pending = [token]
        if not sequence.left:
            del self.running[slot]
        return sequence.key, not sequence.left


class Peer:
    """A context with a KV stream per slot, in float16 as is its default; greedy tokens by numpy."""

    skips: Mapping[str, str] = {}

    def __init__(self, path: str, request: Request) -> None:
        import llama_cpp
        import numpy

        need = capacity(map(Point.parse, request.points))
        self._lib, self._numpy = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = need.sequences * (-(-need.length // 256) * 256)
        params.n_seq_max = need.sequences
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = request.threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context of this size")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._slots = Slots(need.sequences)
        self.vocab: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        system = llama_cpp.llama_print_system_info().decode()
        self.notes: dict[str, Any] = {"llama-cpp-python": llama_cpp.__version__, "system": system}

    def add(self, key: str, prompt: Sequence[int], count: int) -> None:
        self._slots.waiting.append(_Sequence(key, list(prompt), count))

    def step(self) -> list[tuple[str, list[int]]]:
        rows = self._slots.rows(BATCH)
        self._fill(rows)
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        deltas = []
        for index, row in enumerate(rows):
            if not row.last:
                continue
            logits = self._lib.llama_get_logits_ith(self._context, index)
            token = int(self._numpy.ctypeslib.as_array(logits, (self.vocab,)).argmax())
            key, ended = self._slots.take(row.slot, token)
            deltas.append((key, [token]))
            if ended:
                self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), row.slot, -1, -1)
        return deltas

    def busy(self) -> bool:
        return bool(self._slots.waiting or self._slots.running)

    def _fill(self, rows: Sequence[_Row]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.slot
            batch.logits[index] = row.last
