"""The OpenAI-compatible server: a plugin that adds `quire serve` and the configuration's section `server`.

Nothing of FastAPI is imported before the command runs.
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
    """Add `quire serve`."""
    from quire_server.command import serve

    app.command()(serve)


@hookimpl
def quire_config_sections() -> Mapping[str, type[BaseModel]]:
    """The section `server`."""
    return {"server": ServerSettings}
