"""The OpenAI-compatible server: a plugin that adds commands such as `quire serve` and the section `server`.

Nothing of FastAPI is imported before a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quire.plugin import hookimpl

from quire_server.settings import ServerSettings

if TYPE_CHECKING:
    import typer
    from pydantic import BaseModel


@hookimpl
def quire_cli(app: typer.Typer) -> None:
    """Add the commands."""
    from quire_server.batch_command import batch
    from quire_server.client.commands import chat, complete
    from quire_server.command import serve
    from quire_server.load.command import bench_serve
    from quire_server.ps_command import ps

    for command in (serve, chat, complete, batch, ps):
        app.command()(command)
    app.command("bench serve")(bench_serve)


@hookimpl
def quire_config_sections() -> Mapping[str, type[BaseModel]]:
    """The section `server`."""
    return {"server": ServerSettings}
