"""The program's root: global options, subcommands (plugins' too), errors as cause and remedy, exit codes.

0 ok, 1 an unexpected failure, 2 usage or configuration, 3 model not found, 4 out of memory, 130 interrupted.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from quire.cli import bench, check, explain, plan, plugins, run, show
from quire.cli.console import print_error
from quire.cli.logs import set_up_logging
from quire.cli.session import Globals, load_host
from quire.errors import QuireError
from quire.version import __version__

logger = logging.getLogger(__name__)

INTERRUPTED = 130
EXTENDED = frozenset({"bench"})
"""Commands of the core beside which plugins may register one of two words that begins with theirs."""

COMMANDS, FAILURE = "quire.commands", "quire.failure"
"""What the context keeps: plugins' commands by name, and the error that there are none."""


class QuireGroup(typer.core.TyperGroup):
    """The root command: finds plugins' subcommands, and turns errors into two lines and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        found = sorted(self._plugin_commands(ctx))
        if error := ctx.meta.get(FAILURE):
            logger.warning("plugins' commands are not available: %s", error)
        return [*self.commands, *found]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.commands.get(cmd_name) or self._plugin_commands(ctx).get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command's name is one word, or two where plugins add to a command of the core: `bench serve`."""
        if len(args) > 1 and args[0] in EXTENDED and not args[1].startswith("-"):
            command = self._plugin_commands(ctx).get(name := " ".join(args[:2]))
            if command is not None:
                return name, command, args[2:]
        try:
            return super().resolve_command(ctx, args)
        except Exception:
            if error := ctx.meta.get(FAILURE):  # why the command is not there
                raise error from None
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            set_up_logging(bool(ctx.params.get("debug")), bool(ctx.params.get("trace_plugins")))
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "format_message"):  # a usage error, which typer shows itself
                raise
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            print_error(*_told(error))
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            raise typer.Exit(code) from None

    def _plugin_commands(self, ctx: Any) -> dict[str, Any]:
        """Subcommands that plugins add; the plugins are loaded on the first call and only then."""
        found: dict[str, Any] | None = ctx.meta.get(COMMANDS)
        if found is None:
            try:
                set_up_logging(bool(ctx.params.get("debug")), bool(ctx.params.get("trace_plugins")))
                host = load_host(Globals.of(ctx.params))
                found = _collect_commands(host, taken=set(self.commands))
            except QuireError as error:
                found, ctx.meta[FAILURE] = {}, error  # a command of the core goes on without them
            ctx.meta[COMMANDS] = found
        return found


def _told(error: BaseException) -> tuple[str, str]:
    """The cause and the remedy of what ended the program."""
    if isinstance(error, QuireError):
        return error.message, error.remedy
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    remedy = "this should not happen; run again with `quire --debug ...` and report the traceback"
    return f"{type(error).__name__}: {error}", remedy


def _collect_commands(host: Any, taken: set[str]) -> dict[str, Any]:
    app = typer.Typer()

    @app.command(name="-unused", hidden=True)
    def unused() -> None:
        """Keeps typer from folding a single command into the group."""

    @app.callback()
    def group() -> None:
        """As above, should there be none."""

    host.notify("quire_cli", app=app)
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    commands.pop("-unused")
    for name in sorted(taken & set(commands)):
        logger.warning("a plugin's command %r is left out: Quire has one of that name", name)
        del commands[name]
    return commands


def _version(shown: bool) -> None:
    if shown:
        typer.echo(__version__)
        raise typer.Exit


def _blocked(values: list[str] | None) -> list[str]:
    for value in values or ():
        if not value.startswith("no:") or value == "no:":
            raise typer.BadParameter(f"{value!r} does not name a plugin to leave out; write no:NAME")
    return values or []


app = typer.Typer(
    cls=QuireGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run large language models with plugins for every part. `quire run` chats with the bundled model.",
)


@app.callback()
def root(
    context: typer.Context,
    p: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="no:NAME", callback=_blocked, is_eager=True, help="Do not load a plugin."),
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", is_eager=True, help="Load a plugin from one file.")
    ] = None,
    strict_plugins: Annotated[
        bool, typer.Option("--strict-plugins", is_eager=True, help="A plugin that fails to load is an error.")
    ] = False,
    trace_plugins: Annotated[
        bool, typer.Option("--trace-plugins", is_eager=True, help="Tell how plugins are found, called and chosen.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", is_eager=True, help="YAML or TOML file.")
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", is_eager=True, help="Log everything; show a traceback on an error.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")] = False,
) -> None:
    """Keep the global options for the subcommand.

    They are eager, so that `--help` behind them lists the commands of the plugins that they leave.
    """
    context.obj = Globals.of(context.params)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="quire")


run.register(app)
plugins.register(app, explain.explain)
show.register(app)
check.register(app)
bench.register(app)
plan.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
