"""Runs a model over paged KV without an engine, and checks one against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, AttentionInit, KVCaches
from quire.contract.model import CausalLM, ModelInit, ModelSpec, StepContext
from quire.contract.ops import OpInit, OpSet
from quire.errors import UnsupportedModel
from quire.layers.factory import Operations, PluginLayers
from quire.loader.checkpoint import read_checkpoint
from quire.loader.load import load_model
from quire.registry import build_host
from quire.testing.batches import make_batch
from quire.testing.tiny_models import architecture_of, make_checkpoint, reference_model

BLOCK_SIZE = 8
MAX_LEN = 128


@dataclass
class PagedRun:
    """A model with a KV cache, fed chunk by chunk; row r's tokens always live in the same blocks."""

    model: CausalLM
    backend: AttentionBackend
    prompts: Sequence[Sequence[int]]
    seed: int = 0
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = [0] * len(self.prompts)
        full = make_batch([len(p) for p in self.prompts], self.done, block_size=BLOCK_SIZE, seed=self.seed)
        self._tables, self._num_blocks = full.tables, full.num_blocks
        specs = [
            self.backend.kv_spec(layer, BLOCK_SIZE, self.backend.init.cache_dtype)
            for layer in self.model.attention_layers
        ]
        self._kv: tuple[KVCaches, ...] = tuple(
            tuple(torch.zeros(self._num_blocks, *spec.shape, dtype=spec.dtype) for spec in layer) for layer in specs
        )

    def feed(self, counts: Sequence[int]) -> list[Tensor]:
        """Compute the next `counts[r]` tokens of each row; float32 logits [count, V] per row."""
        return list(torch.split(self.step(counts), [count for count in counts if count]))

    @torch.inference_mode()
    def step(self, counts: Sequence[int], wanted: Tensor | None = None) -> Tensor:
        """As `feed`: logits [T, V] of the step's tokens, or [R, V] of those `wanted`."""
        rows = [row for row, count in enumerate(counts) if count]
        case = make_batch([counts[r] for r in rows], [self.done[r] for r in rows], block_size=BLOCK_SIZE)
        batch = case.batch
        width = batch.block_table.shape[1]
        slots: list[int] = []
        for index, row in enumerate(rows):
            table = self._tables[row][:width]
            batch.block_table[index] = 0
            batch.block_table[index, : len(table)] = torch.tensor(table, dtype=torch.int32)
            positions = range(self.done[row], self.done[row] + counts[row])
            slots += [self._tables[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        batch.slot_mapping.copy_(torch.tensor(slots))
        ids = [t for r in rows for t in self.prompts[r][self.done[r] : self.done[r] + counts[r]]]
        at = [p for r in rows for p in range(self.done[r], self.done[r] + counts[r])]
        ctx = StepContext(self.backend, batch, self.backend.plan(batch), self._kv, wanted)
        hidden = self.model.forward(torch.tensor(ids), torch.tensor(at), ctx)
        if wanted is not None and len(hidden) == len(ids):
            hidden = hidden[wanted]
        logits = self.model.logits(hidden).float()
        for row in rows:
            self.done[row] += counts[row]
        return logits


class ModelConformance:
    """Holds a model spec against transformers. Subclass, and give the fixture `spec`."""

    tolerance = 1e-4
    """Largest absolute difference of float32 logits."""

    @pytest.fixture
    def architecture(self, spec: ModelSpec) -> str:
        """A name in `quire.testing.tiny_models.ARCHITECTURES`; by default the first that the spec serves."""
        name = architecture_of(spec)
        if name is None:
            raise pytest.UsageError(f"no small checkpoint is known for {sorted(spec.architectures)}; see tiny_models")
        return name

    @pytest.fixture
    def spec(self) -> ModelSpec:
        """The spec under test."""
        raise pytest.UsageError("define the fixture `spec`")

    @pytest.fixture
    def parts(self) -> tuple[type[AttentionBackend], type[OpSet]]:
        """The attention backend and op set to run it on; by default the references."""
        host = build_host()
        return host.load("attention", "cpu_ref"), host.load("op", "torch")

    @pytest.fixture
    def folder(self, architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The architecture's random checkpoint, made once per test session."""
        folder = tmp_path_factory.getbasetemp() / f"checkpoint-{architecture}"
        return folder if folder.exists() else make_checkpoint(architecture, folder)

    def load(
        self,
        folder: Path,
        spec: ModelSpec,
        parts: tuple[type[AttentionBackend], type[OpSet]],
        dtype: torch.dtype = torch.float32,
        *,
        deterministic: bool = False,
    ) -> tuple[CausalLM, AttentionBackend]:
        checkpoint = read_checkpoint("test", folder)
        assert spec.why_not(checkpoint.config) == []
        device = torch.device("cpu")
        layers = PluginLayers(Operations([("ops", parts[1](OpInit(device, 256)))], {}))
        config = spec.config_from_hf(checkpoint.config)
        init = ModelInit(config, device, dtype, MAX_LEN, layers, deterministic, str(folder), checkpoint.stored_rows)
        model = load_model(checkpoint, spec, init)
        attention = AttentionInit(
            device, dtype, model.attention_layers, BLOCK_SIZE, 8, 256, MAX_LEN // BLOCK_SIZE, deterministic
        )
        return model, parts[0](attention)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in (21, 1, 40, 9)]

    def test_logits_equal_transformers(
        self, folder: Path, spec: ModelSpec, parts: tuple[type[AttentionBackend], type[OpSet]]
    ) -> None:
        """Every position's logits, several requests in one batch over scattered blocks.

        If it fails: compare layer by layer with the model in transformers: norms' offsets, rotary settings and scales
        are what is wrong most often.
        """
        model, backend = self.load(folder, spec, parts)
        reference = reference_model(folder)
        prompts = self.prompts(model.vocab_size)
        for prompt, ours in zip(
            prompts, PagedRun(model, backend, prompts).feed([len(p) for p in prompts]), strict=True
        ):
            with torch.inference_mode():
                theirs = reference(torch.tensor([prompt])).logits[0].float()
            torch.testing.assert_close(ours, theirs, atol=self.tolerance, rtol=0)

    def test_chunks_and_decode_equal_prefill(
        self, folder: Path, spec: ModelSpec, parts: tuple[type[AttentionBackend], type[OpSet]]
    ) -> None:
        """The same logits whether a prompt is computed at once, in uneven chunks, or token by token.

        If it fails: take positions from the argument, never from the batch's shape, and keep nothing between calls.
        """
        model, backend = self.load(folder, spec, parts)
        prompts = [p for p in self.prompts(model.vocab_size) if len(p) > 1]
        whole = PagedRun(model, backend, prompts).feed([len(p) for p in prompts])
        run = PagedRun(model, backend, prompts, seed=5)
        pieces: list[list[Tensor]] = [[] for _ in prompts]
        step = 0
        while any(done < len(p) for done, p in zip(run.done, prompts, strict=True)):
            counts = [min((1, 5, 1)[(row + step) % 3], len(p) - run.done[row]) for row, p in enumerate(prompts)]
            active = [row for row, count in enumerate(counts) if count]
            for row, logits in zip(active, run.feed(counts), strict=True):
                pieces[row].append(logits)
            step += 1
        for at_once, piece in zip(whole, pieces, strict=True):
            torch.testing.assert_close(torch.cat(piece), at_once, atol=self.tolerance, rtol=0)

    def test_wanted_tokens_alone(
        self, folder: Path, spec: ModelSpec, parts: tuple[type[AttentionBackend], type[OpSet]]
    ) -> None:
        """A step of which few tokens' states are wanted gives those of the same tokens, and caches all.

        If it fails: return the states of all tokens, or those of `ctx.wanted` in its order; leave nothing out before
        the last layer's keys and values are in the cache.
        """
        model, backend = self.load(folder, spec, parts)
        prompts = [p for p in self.prompts(model.vocab_size) if len(p) > 2]
        run, few = (PagedRun(model, backend, prompts) for _ in range(2))
        firsts = [len(p) // 2 for p in prompts]
        ends = torch.tensor(firsts).cumsum(0) - 1
        torch.testing.assert_close(few.step(firsts, ends), run.step(firsts)[ends], atol=self.tolerance, rtol=0)
        rests = [len(p) - first for p, first in zip(prompts, firsts, strict=True)]
        torch.testing.assert_close(few.step(rests), run.step(rests), atol=self.tolerance, rtol=0)

    def test_missing_and_unexpected_tensors_are_named(
        self,
        folder: Path,
        spec: ModelSpec,
        parts: tuple[type[AttentionBackend], type[OpSet]],
        tmp_path: Path,
    ) -> None:
        """A load that cannot place every tensor, or lacks one, fails with its name.

        If it fails: return False from `load_weight` for unknown names, and list in `missing_weights` what was not
        loaded.
        """
        import shutil

        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        victim = next(name for name in sorted(tensors) if ".0." in name)
        shutil.copy(folder / "config.json", tmp_path)
        save_file({name: t for name, t in tensors.items() if name != victim}, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModel, match=victim.replace(".", r"\.")):
            self.load(tmp_path, spec, parts)
        save_file(tensors | {"model.surprise.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModel, match=r"model\.surprise\.weight"):
            self.load(tmp_path, spec, parts)

    def test_bfloat16_stays_close(
        self, folder: Path, spec: ModelSpec, parts: tuple[type[AttentionBackend], type[OpSet]]
    ) -> None:
        """bfloat16 runs, and its logits point the same way as float32's.

        If it fails: norm, rotate and take the softmax in float32.
        """
        prompts = self.prompts(100)
        outcomes = []
        for dtype in (torch.float32, torch.bfloat16):
            model, backend = self.load(folder, spec, parts, dtype)
            outcomes.append(torch.cat(PagedRun(model, backend, prompts).feed([len(p) for p in prompts])))
        similarity = torch.nn.functional.cosine_similarity(outcomes[0], outcomes[1])
        assert similarity.min() > 0.9
        assert similarity.mean() > 0.99
