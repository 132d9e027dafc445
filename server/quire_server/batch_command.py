"""The command `quire batch`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from quire import ConfigError
from quire.commands import engine_flags, note, open_session, start_engine

from quire_server.client.address import Address
from quire_server.command import check_packages
from quire_server.settings import ServerSettings

PANEL = "Batch"


@engine_flags("model")
def batch(
    context: typer.Context,
    options: dict[str, Any],
    source: Annotated[Path, typer.Argument(metavar="IN.JSONL", help="Requests, one per line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.JSONL", help="Results; those that it holds are kept.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id.", rich_help_panel=PANEL)] = None,
    url: Annotated[str | None, typer.Option(help="A running server, instead.", rich_help_panel=PANEL)] = None,
    key: Annotated[
        str | None, typer.Option(help="Key of that server.", envvar="OPENAI_API_KEY", rich_help_panel=PANEL)
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests at a time.", rich_help_panel=PANEL)] = 64,
) -> None:
    """Answer a file of requests, as OpenAI's batch API writes them.

    A line that cannot be answered gets a result that says why. Ended and called again, it goes on
    with the lines that have no result yet.
    """
    check_packages()
    from quire_server.batch import Summary, answered, client_for, read_lines, run_batch
    from quire_server.client.connection import Connection

    if url is not None and (model is not None or options):
        raise ConfigError("--url names a server that runs; flags of an engine have no effect on it")
    lines = read_lines(source)
    answered(target)  # a file that is no result is told before the model is loaded

    async def run(app_or_address: Any) -> Summary:
        async with client_for(app_or_address, key) as client:
            return await run_batch(client, lines, target, concurrency)

    if url is not None:
        address = Address.parse(url)
        with Connection(address, key) as connection:
            connection.models()  # a server that is not there, or wants another key, is told once and not per line
        summary = asyncio.run(run(address))
    else:
        from quire_server.app import create_app
        from quire_server.state import ServerState

        session = open_session(context, options if model is None else {**options, "model": model})
        settings = cast(ServerSettings, session.section("server", api_keys=(), api_keys_file=None))
        llm = start_engine(session)
        try:
            summary = asyncio.run(run(create_app(ServerState(llm, settings.model_copy(update={"access_log": False})))))
        finally:
            llm.shutdown()
    note(f"{summary.succeeded} answered, {summary.failed} failed, {summary.skipped} had an answer already")
