"""`quire quantize`: make a quantized checkpoint from an unquantized one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from quire.commands import note, print_table, resolve_checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id; unquantized.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; an unfinished run is taken up.")],
    method: Annotated[Literal["gptq", "awq", "rtn"], typer.Option(help="rtn rounds and needs no text.")] = "gptq",
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: all of them.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text, or JSON lines with `text` or `messages`.")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Zero points of their own; AWQ always.")] = False,
    samples: Annotated[int, typer.Option(min=2, help="Rows of calibration text at most.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of each row.")] = 512,
    damping: Annotated[float, typer.Option(min=0.0, max=1.0, help="GPTQ's, as a share of the mean.")] = 0.01,
) -> None:
    """Write a quantized form of a model, layer by layer, with a report of what it lost.

    GPTQ and AWQ choose codes by what calibration text does to each layer. AWQ of 4 bits is stored in AWQ's
    format, everything else in GPTQ's.
    """
    from transformers import AutoTokenizer

    from quire_quant.calibration import read_rows
    from quire_quant.layer import Recipe
    from quire_quant.produce import produce

    source = resolve_checkpoint(model)
    recipe = Recipe(method, bits, group_size, sym=not asymmetric and method != "awq", damping=damping)
    rows = None
    if calibration is not None:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        rows = read_rows(calibration, tokenizer, sequence_length, samples)
        note(f"calibrating with {len(rows)} rows of {sequence_length} tokens")
    with bar() as show:
        report = produce(source, out, recipe, rows, show)
    print_table(("WHAT", "BEFORE", "AFTER"), report.table())
    if report.errors:
        note(report.worst())
    if report.skipped:
        note(f"left as they were, as they do not fill whole groups and words: {', '.join(report.skipped)}")
    note(f"written to {out}; try: quire run -m {out}")


@contextmanager
def bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with the time that is left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        yield show
