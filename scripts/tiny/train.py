"""Trains quire-tiny: `python -m tiny.train --out FOLDER --minutes 100` (from the folder `scripts`).

Seeded and resumable: the state is saved every few minutes, and the same command goes on from it.
The learning rate falls to zero when the minutes are used up.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from tiny.data import PRACTICE, TASKS, Task, evaluation_set, training_stream
from tiny.evaluate import accuracy, transformers_backend
from tiny.model import MAX_POSITIONS, build_model
from tiny.muon import Muon
from tiny.sample import Sample
from tiny.tokenizer import END, answer_ids, prompt_ids, train_tokenizer

POOL = 4096
"""Samples that are sorted by length together, so that batches hold little padding."""

MATRIX_LR = 0.02
VECTOR_LR = 0.003
WARM_UP = 0.02
SAVE_EVERY_S = 240.0
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of training learns from, and at which rates.

    Attributes:
        tasks: the mixture. tokens: per batch, about.
        peak: share of the learning rates. flat_until: share of the time after which they fall.
    """

    tasks: Sequence[Task]
    tokens: int
    peak: float
    flat_until: float


MAIN = Stage(TASKS, tokens=8192, peak=1.0, flat_until=0.45)
SECOND = Stage(PRACTICE, tokens=4096, peak=0.5, flat_until=0.5)
"""Goes on from a main stage; smaller batches, as a look-up wants steps more than smooth gradients."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded token ids [B, L] and targets [B, L], which are IGNORED outside the answers."""

    input_ids: Tensor
    targets: Tensor


Encoded = tuple[list[int], list[int]]
"""A sample's token ids, and its targets: the next id, or IGNORED where nothing is to be learnt."""


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, stage: Stage) -> Iterator[Batch]:
    """Endless batches of about `stage.tokens` tokens, each of samples of similar length."""
    stream, rng = training_stream(seed, stage.tasks), random.Random(seed)
    while True:
        pool = [encode(tokenizer, sample) for sample in itertools.islice(stream, POOL)]
        pool.sort(key=lambda encoded: len(encoded[0]))
        chunks = list(_chunks(pool, stage.tokens))
        rng.shuffle(chunks)
        for chunk in chunks:
            yield _collate(chunk)


def encode(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> Encoded:
    """The ids of prompt and answer; targets on the answer, and on earlier answers if the sample says so."""
    prompt, answer = prompt_ids(tokenizer, sample), answer_ids(tokenizer, sample)
    ids = prompt + answer
    targets = [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
    if sample.learn_turns:
        begin, end = tokenizer.encode("<|im_start|>assistant\n"), int(tokenizer.eos_token_id)
        for start in range(len(begin), len(prompt)):
            if ids[start - len(begin) : start] == begin and end in prompt[start:]:
                stop = prompt.index(end, start)
                targets[start - 1 : stop] = ids[start : stop + 1]
    return ids, targets


def _chunks(pool: list[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    chunk: list[Encoded] = []
    for pair in pool:
        length = len(pair[0])  # sorted: the longest of the chunk so far
        if chunk and (len(chunk) + 1) * length > tokens:
            yield chunk
            chunk = []
        chunk.append(pair)
    yield chunk


def _collate(chunk: list[Encoded]) -> Batch:
    length = max(len(ids) for ids, _ in chunk)
    input_ids = torch.zeros(len(chunk), length, dtype=torch.long)
    targets = torch.full((len(chunk), length), IGNORED)
    for row, (ids, wanted) in enumerate(chunk):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids)] = torch.tensor(wanted)
    return Batch(input_ids, targets)


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens. Right padding needs no mask: attention is causal."""
    hidden = model.model(input_ids=batch.input_ids).last_hidden_state
    wanted = batch.targets != IGNORED
    logits = model.lm_head(hidden[wanted]).float()
    return functional.cross_entropy(logits, batch.targets[wanted])


def rate(progress: float, flat_until: float) -> float:
    """Share of the peak learning rate: warm-up, flat, then linearly to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return min(1.0, (1.0 - progress) / (1.0 - flat_until))


class Trainer:
    """The training state, which can be saved and taken up again."""

    def __init__(self, out: Path, minutes: float, seed: int, start: Path | None = None) -> None:
        self.stage = SECOND if start else MAIN
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
        if start and not (out / "state.pt").exists():
            self._load(start)
            self.step, self.elapsed = 0, 0.0
        elif (out / "state.pt").exists():
            self._load(out / "state.pt")

    def run(self) -> None:
        """Train until the minutes are used up, then save the model."""
        stream = batches(self.tokenizer, self.seed * 1000 + self.round, self.stage)
        self.round += 1
        last = saved = time.monotonic()
        while self.elapsed < self.budget:
            self._set_rate(self.stage.peak * rate(self.elapsed / self.budget, self.stage.flat_until))
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

    def _load(self, path: Path) -> None:
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
        loss.backward()  # type: ignore[no-untyped-call]
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
    parser.add_argument("--start", type=Path, help="state.pt of a main stage: go on from it with the second stage")
    parser.add_argument("--minutes", type=float, default=100.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer(options.out, options.minutes, options.seed, options.start).run()


if __name__ == "__main__":
    main()
