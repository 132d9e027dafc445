"""Accuracy of quire-tiny per task on held-out problems: `python -m tiny.evaluate FOLDER [--json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tiny.data import evaluation_set, is_right
from tiny.sample import Sample
from tiny.tokenizer import END, prompt_ids

MAX_NEW_TOKENS = 128
BATCH = 64

Generate = Callable[[Sequence[list[int]]], list[list[int]]]
"""Prompts as token ids to greedy continuations."""


def accuracy(
    generate: Generate, tokenizer: PreTrainedTokenizerFast, problems: Mapping[str, Sequence[Sample]]
) -> dict[str, tuple[int, int]]:
    """Task -> (right answers, problems)."""
    flat = [(name, sample) for name, samples in problems.items() for sample in samples]
    order = sorted(range(len(flat)), key=lambda index: len(prompt_ids(tokenizer, flat[index][1])))
    table = {name: (0, len(samples)) for name, samples in problems.items()}
    end = tokenizer.convert_tokens_to_ids(END)
    for start in range(0, len(order), BATCH):
        chosen = [flat[index] for index in order[start : start + BATCH]]
        replies = generate([prompt_ids(tokenizer, sample) for _, sample in chosen])
        for (name, sample), reply in zip(chosen, replies, strict=True):
            text = tokenizer.decode(reply[: reply.index(end)] if end in reply else reply)
            right, count = table[name]
            table[name] = (right + is_right(sample, text), count)
    return table


def transformers_backend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Generate:
    """Greedy generation by transformers, left-padded."""

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        pad = int(tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.eval()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, use_cache=True
            )
        rows: list[list[int]] = out[:, width:].tolist()
        return rows

    return generate


def quire_backend(folder: Path) -> Generate:
    """Greedy generation by Quire's own engine."""
    from quire import LLM, SamplingParams

    llm = LLM(str(folder))

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
        return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params, use_tqdm=False)]

    return generate


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=("quire", "transformers"), default="quire")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    if options.backend == "quire":
        generate = quire_backend(options.folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        generate = transformers_backend(model, tokenizer)
    table = accuracy(generate, tokenizer, evaluation_set(options.seed, options.per_task))
    if options.json:
        print(json.dumps({name: {"right": right, "of": count} for name, (right, count) in table.items()}))
        return
    for name, (right, count) in table.items():
        print(f"{name:12} {right:4}/{count:<4} {100 * right / count:5.1f} %")


if __name__ == "__main__":
    main()
