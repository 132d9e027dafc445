"""`quire plan`: what a model would take of this machine's memory, in each form."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from quire.cli.console import note, print_table
from quire.cli.flags import engine_flags
from quire.cli.session import open_session
from quire.engine.plan import Plan, make_plan
from quire.errors import ConfigError
from quire.loader.outline import outline
from quire.resolve import resolve


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


@engine_flags("model", "process", "step_timeout")
def plan(
    context: typer.Context,
    options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: all of a layer's.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, in bytes.")] = False,
) -> None:
    """Print the bytes of weights and KV cache by dtype and method, and what of it fits here. Reads no weights.

    Only config.json and the headers of the weights are read; of a Hugging Face id, or in a folder without weights,
    config.json alone.
    """
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"--group-size is {group_size}", remedy="give a positive number, or -1")
    session = open_session(context, options if model is None else {**options, "model": model})
    config = session.configured.config
    resolved = resolve(session.configured, session.host, outline(config.model, config.revision))
    found = make_plan(resolved, group_size)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        show(found)


def show(found: Plan) -> None:
    """Print a plan as tables."""
    size = f"{found.parameters:,} parameters" if found.parameters is not None else "quantized already"
    note(f"{found.model}: {size}, requests of up to {found.max_model_len:,} tokens")
    note(f"{found.device}: {gib(found.memory_total)} of memory, {gib(found.memory_free)} of it free")
    rows = [
        (
            row.form,
            row.methods,
            gib(row.num_bytes),
            "yes" if row.fits else "no",
            f"{row.kv_tokens:,}",
            str(row.requests),
        )
        for row in found.weights
    ]
    print_table(("WEIGHTS", "METHOD", "SIZE", "FITS", "TOKENS OF KV", "LONGEST REQUESTS"), rows)
    print_table(
        ("KV CACHE", "BYTES PER TOKEN", "LONGEST REQUEST"),
        [(row.dtype, f"{row.bytes_per_token:,}", gib(row.bytes_per_request)) for row in found.kv],
    )
    note(
        f"The pool is half of what the weights leave, in {found.compute_dtype}, unless kv_cache_memory says otherwise; "
        "quantized layers without a kernel on this device are held in the compute dtype."
    )


def gib(size: int) -> str:
    """Bytes in a fitting unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):,.2f} {unit}"
    return f"{size} B"
