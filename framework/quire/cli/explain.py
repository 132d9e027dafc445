"""`quire plugins explain`: why each provider of a point was or was not chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from quire.choices import explain_point
from quire.cli.console import note, print_table
from quire.cli.session import Session, open_session
from quire.engine.explained import LayerChoice, explain_layers
from quire.loader.checkpoint import BUNDLED, resolve_checkpoint
from quire.loader.outline import outline
from quire.registry import Candidate
from quire.resolve import resolve

OF_A_MODEL = ("attention", "model", "quantization")
"""Points whose choice depends on the model."""


def explain(
    context: typer.Context,
    point: Annotated[str, typer.Argument(metavar="POINT", help="Such as attention.")],
    model: Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="For which model.")] = None,
    file: Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE", help="As before the command.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say why each candidate for an extension point was or was not chosen."""
    if file is not None:
        context.obj = replace(context.obj, config=file)
    session = open_session(context, {} if model is None else {"model": model})
    config = session.configured.config
    session.host.providers(point)  # an unknown point is the first thing to say
    checkpoint = resolve_checkpoint(config.model, config.revision) if point in OF_A_MODEL else None
    if checkpoint is not None and config.model is None:
        note(f"no model named: explained for the bundled {BUNDLED}")
    table = explain_point(config, session.host, point, checkpoint)
    layers = _layers(session) if point == "quantization" else None
    if as_json:
        candidates = [_as_dict(candidate) for candidate in table]
        whole = candidates if layers is None else {"candidates": candidates, "layers": [asdict(row) for row in layers]}
        typer.echo(json.dumps(whole, indent=2))
        return
    rows = [
        (item.provider.name, item.plugin, str(item.provider.priority), "yes" if item.chosen else "no", _why(item))
        for item in table
    ]
    print_table(("NAME", "PLUGIN", "PRIORITY", "CHOSEN", "WHY"), rows)
    if layers is not None:
        print_table(
            ("LAYERS", "", "WEIGHT", "MULTIPLIED BY", "BECAUSE"),
            [(row.layers, str(row.count), row.form, row.op or "the method itself", _because(row)) for row in layers],
        )
        note("another kernel is named by `--quant-kernel NAME`, or quant.kernel in the configuration")


def _layers(session: Session) -> list[LayerChoice]:
    config = session.configured.config
    checkpoint = outline(config.model, config.revision)
    return explain_layers(resolve(session.configured, session.host, checkpoint), session.host)


def _because(row: LayerChoice) -> str:
    return row.why or ("" if row.op is None else "it stands first, or was asked for by name")


def _why(item: Candidate) -> str:
    if item.chosen:
        return "the highest priority that fits, or asked for by name"
    return "; ".join(item.reasons) or item.note


def _as_dict(item: Candidate) -> dict[str, object]:
    return {
        "point": item.provider.point,
        "name": item.provider.name,
        "plugin": item.plugin,
        "priority": item.provider.priority,
        "chosen": item.chosen,
        "reasons": list(item.reasons),
        "note": item.note,
    }
