"""`quire plugins new`: a plugin's repository, complete and working, to start from."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Annotated

import typer

from quire.scaffold import new_plugin


def new(
    point: Annotated[str, typer.Argument(metavar="POINT", help="The extension point, such as attention.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the plugin and what it provides, such as mine.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="FOLDER", help="Where to; otherwise ./quire-NAME.")
    ] = None,
    license_name: Annotated[str, typer.Option("--license", metavar="SPDX", help="MIT or Apache-2.0.")] = "MIT",
    author: Annotated[str | None, typer.Option(metavar="NAME", help="Who holds the copyright.")] = None,
) -> None:
    """Write a complete plugin: code that works, its conformance test, packaging, CI. Overwrites nothing."""
    holder = author or f"the authors of {name}"
    year = datetime.datetime.now(tz=datetime.UTC).year
    files = new_plugin(point, name, folder, license=license_name, holder=holder, year=year)
    root = next(file.parent for file in files if file.name == "pyproject.toml")
    for file in files:
        typer.echo(str(file))
    typer.echo(f"\nNext: cd {shlex.quote(str(root))} && pip install -e '.[test]' && quire plugins test {name}")
    typer.echo("README.md there has the other commands; the code to change is in the package beside it.")
