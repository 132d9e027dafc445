"""Accuracy of quire-tiny per task by quantization method and bits: `python -m tiny.quantized --out FOLDER`.

Calibrates with samples of the training stream, rendered as the model's chats are, and asks the held-out problems of
`tiny.evaluate`. Prints a Markdown table; what is made stays in the folder, and finished rows are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from quire.commands import resolve_checkpoint
from quire_quant.layer import Recipe
from quire_quant.produce import produce
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny.data import evaluation_set, training_stream
from tiny.evaluate import accuracy, quire_backend
from tiny.tokenizer import answer_ids, prompt_ids

LENGTH = 512
RESULT = "accuracy.json"
Table = dict[str, tuple[int, int]]


def calibration_rows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> Tensor:
    """Token ids int64 [count, LENGTH]: chats one behind the other, cut into rows."""
    ids: list[int] = []
    for sample in training_stream(seed):
        ids += prompt_ids(tokenizer, sample) + answer_ids(tokenizer, sample)
        if len(ids) >= count * LENGTH:
            break
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def measure(source: str, folder: Path, recipe: Recipe | None, rows: Tensor, per_task: int) -> Table:
    """Right answers and problems of each task, by the model that the recipe makes of `source`; None: by itself."""
    result = folder / RESULT
    if result.is_file():
        return {name: (right, count) for name, (right, count) in json.loads(result.read_text()).items()}
    checkpoint = resolve_checkpoint(source)
    model = checkpoint.folder
    if recipe is not None:
        model = folder / "model"
        if not (model / "config.json").is_file():
            produce(checkpoint, model, recipe, None if recipe.method == "rtn" else rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = accuracy(quire_backend(model), tokenizer, evaluation_set(1, per_task))
    folder.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(table))
    return table


def row(name: str, table: Table, exact: Table) -> str:
    """Right answers of all problems, the points lost, and the tasks that lost most."""

    def share(counts: Sequence[tuple[int, int]]) -> float:
        return 100 * sum(right for right, _ in counts) / sum(count for _, count in counts)

    lost = {task: share([exact[task]]) - share([table[task]]) for task in table}
    worst = islice(sorted(lost, key=lambda task: -lost[task]), 3)
    named = ", ".join(f"{task} {lost[task]:.1f}" for task in worst if lost[task] > 0)
    whole = share(list(table.values()))
    return f"| {name} | {whole:.1f} % | {whole - share(list(exact.values())):+.1f} | {named} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="quire-tiny")
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--per-task", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(options.model).folder)
    rows = calibration_rows(tokenizer, options.rows, seed=0)
    exact = measure(options.model, options.out / "exact", None, rows, options.per_task)
    print("| | right | points | points lost most |\n|---|---:|---:|---|", flush=True)
    print(row("bfloat16", exact, exact), flush=True)
    for bits in options.bits:
        for method in options.methods:
            recipe = Recipe(method, bits, options.group_size, sym=method != "awq")
            name = f"{method}-{bits}-{options.group_size}"
            print(
                row(name, measure(options.model, options.out / name, recipe, rows, options.per_task), exact), flush=True
            )


if __name__ == "__main__":
    main()
