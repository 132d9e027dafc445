"""Trains quire-tiny: `python -m tiny.train --out FOLDER --minutes 100` (from the folder `scripts`).

Seeded and resumable: the state is saved every few minutes, and the same command goes on from it.
The learning rate falls to zero when the minutes are used up.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from tiny.data import evaluation_set, training_stream
from tiny.evaluate import accuracy, transformers_backend
from tiny.model import MAX_POSITIONS, build_model
from tiny.muon import Muon
from tiny.tokenizer import END, answer_ids, prompt_ids, train_tokenizer

POOL = 4096
"""Samples that are sorted by length together, so that batches hold little padding."""
TOKENS_PER_BATCH = 8192
MATRIX_LR = 0.02
VECTOR_LR = 0.003
WARM_UP = 0.02
FLAT_UNTIL = 0.45
SAVE_EVERY_S = 240.0
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded token ids [B, L] and targets [B, L], which are IGNORED outside the answers."""

    input_ids: Tensor
    targets: Tensor


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of about TOKENS_PER_BATCH tokens, each of samples of similar length."""
    stream, rng = training_stream(seed), random.Random(seed)
    while True:
        pool = [
            (prompt_ids(tokenizer, sample), answer_ids(tokenizer, sample)) for sample in itertools.islice(stream, POOL)
        ]
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = list(_chunks(pool))
        rng.shuffle(chunks)
        for chunk in chunks:
            yield _collate(chunk)


def _chunks(pool: list[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    chunk: list[tuple[list[int], list[int]]] = []
    for pair in pool:
        length = len(pair[0]) + len(pair[1])  # sorted: the longest of the chunk so far
        if chunk and (len(chunk) + 1) * length > TOKENS_PER_BATCH:
            yield chunk
            chunk = []
        chunk.append(pair)
    yield chunk


def _collate(chunk: list[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(prompt) + len(answer) for prompt, answer in chunk)
    input_ids = torch.zeros(len(chunk), length, dtype=torch.long)
    targets = torch.full((len(chunk), length), IGNORED)
    for row, (prompt, answer) in enumerate(chunk):
        ids = torch.tensor(prompt + answer)
        input_ids[row, : len(ids)] = ids
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return Batch(input_ids, targets)


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens. Right padding needs no mask: attention is causal."""
    hidden = model.model(input_ids=batch.input_ids).last_hidden_state
    wanted = batch.targets != IGNORED
    logits = model.lm_head(hidden[wanted]).float()
    return functional.cross_entropy(logits, batch.targets[wanted])


def rate(progress: float) -> float:
    """Share of the peak learning rate: warm-up, flat, then linearly to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return min(1.0, (1.0 - progress) / (1.0 - FLAT_UNTIL))


class Trainer:
    """The training state, which can be saved and taken up again."""

    def __init__(self, out: Path, minutes: float, seed: int) -> None:
        self.out, self.budget, self.seed = out, minutes * 60.0, seed
        self.tokenizer = train_tokenizer(seed)
        end = self.tokenizer.convert_tokens_to_ids(END)
        self.model = build_model(seed, end, int(self.tokenizer.pad_token_id))
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=MATRIX_LR),
            torch.optim.AdamW(others, lr=VECTOR_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = (MATRIX_LR, VECTOR_LR)
        self.step, self.elapsed, self.round = 0, 0.0, 0
        self._resume()

    def run(self) -> None:
        """Train until the minutes are used up, then save the model."""
        stream = batches(self.tokenizer, self.seed * 1000 + self.round)
        self.round += 1
        last = saved = time.monotonic()
        while self.elapsed < self.budget:
            self._set_rate(rate(self.elapsed / self.budget))
            loss = self._update(next(stream))
            now = time.monotonic()
            self.elapsed, last, self.step = self.elapsed + now - last, now, self.step + 1
            if self.step % 100 == 0:
                print(f"step {self.step} minutes {self.elapsed / 60:.1f} loss {loss:.4f}", flush=True)
            if now - saved > SAVE_EVERY_S:
                self.save()
                self._report(per_task=40)
                saved = last = time.monotonic()
        self.save()
        self._report(per_task=200)

    def save(self) -> None:
        """Write the model in bfloat16, and the state to go on from."""
        self.out.mkdir(parents=True, exist_ok=True)
        export(self.model, self.tokenizer, self.out / "model")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.elapsed, self.round),
        }
        torch.save(state, self.out / "state.pt.new")
        (self.out / "state.pt.new").replace(self.out / "state.pt")

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed, self.round = state["progress"]

    def _set_rate(self, share: float) -> None:
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share

    def _update(self, batch: Batch) -> float:
        self.model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _report(self, per_task: int) -> None:
        generate = transformers_backend(self.model, self.tokenizer)
        table = accuracy(generate, self.tokenizer, evaluation_set(self.seed + 1, per_task))
        print("  ".join(f"{name} {right}/{count}" for name, (right, count) in table.items()), flush=True)


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in Hugging Face format, bfloat16, without touching the model in training."""
    end = model.config.eos_token_id
    copy = build_model(0, end, model.config.pad_token_id)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.config.use_cache = True
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end], pad_token_id=model.config.pad_token_id, use_cache=True
    )
    copy.save_pretrained(folder)
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # the weights come out readable by their owner alone, which a wheel would keep
        file.chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the model")
    parser.add_argument("--minutes", type=float, default=100.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer(options.out, options.minutes, options.seed).run()


if __name__ == "__main__":
    main()
