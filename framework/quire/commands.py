"""The door for plugins' subcommands: flags of the engine, the session that they open, the chat, where to write.

@hookimpl
def quire_cli(app):
    @app.command()
    @engine_flags("model")
    def serve(context: typer.Context, options: dict[str, Any], model: str | None = None) -> None:
        session = open_session(context, options | ({"model": model} if model else {}))
        engine = start_engine(session)
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.async_llm import AsyncLLM
from quire.cli.chat import Chat
from quire.cli.console import note, print_table
from quire.cli.conversation import Answer, Conversation, Writer
from quire.cli.flags import engine_flags
from quire.cli.logs import log_information
from quire.cli.session import Session, open_session
from quire.contract.metrics import MetricsSink
from quire.garbage import spare_what_stays
from quire.loader.checkpoint import BUNDLED, Checkpoint, resolve_checkpoint
from quire.remote.start import served_engine

__all__ = [
    "BUNDLED",
    "Answer",
    "Chat",
    "Checkpoint",
    "Conversation",
    "Session",
    "Writer",
    "engine_flags",
    "log_information",
    "note",
    "open_session",
    "print_table",
    "resolve_checkpoint",
    "spare_what_stays",
    "start_engine",
]


def start_engine(session: Session, sinks: Sequence[tuple[str, MetricsSink]] = ()) -> AsyncLLM:
    """Load the session's model and start its engine in a thread of its own.

    Args:
        session: what `open_session` returned.
        sinks: (name, metrics sink) that the engine feeds beside the configured ones.

    Raises:
        ConfigError: the configuration cannot be run; the message says why and what to do.
    """
    return AsyncLLM.over(served_engine(session.configured, session.host), sinks)
