"""The program's log: one line per message on stderr, tracebacks only with `--debug`."""

from __future__ import annotations

import logging

from quire.cli.console import errors
from quire.config import special_variable
from quire.errors import ConfigError
from quire.host.objects import first_line
from quire.host.trace import logger as plugins

LEVELS = ("debug", "info", "warning", "error", "critical")


class Short(logging.Formatter):
    """Level and message; of an exception only its type and first line."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        reason = f" ({first_line(error)})" if error is not None else ""
        return f"{record.levelname.lower()}: {record.getMessage()}{reason}"


def log_information() -> None:
    """For a command that runs long: its log says what happens too, unless the user has chosen the level."""
    quire = logging.getLogger("quire")
    if special_variable("QUIRE_LOG_LEVEL") is None and quire.level > logging.INFO:
        quire.setLevel(logging.INFO)


def set_up_logging(debug: bool, trace: bool = False) -> None:
    """Send the log of `quire` to stderr, at the level of QUIRE_LOG_LEVEL; with `trace` each step of the plugin host.

    Raises ConfigError for an unknown level.
    """
    level = "debug" if debug else (special_variable("QUIRE_LOG_LEVEL") or "warning").lower()
    if level not in LEVELS:
        raise ConfigError(f"QUIRE_LOG_LEVEL is {level!r}", remedy=f"use one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(errors().file)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s") if debug else Short())
    quire = logging.getLogger("quire")
    quire.handlers[:] = [handler]
    quire.setLevel(level.upper())
    quire.propagate = False
    steps = logging.StreamHandler(errors().file)
    steps.setFormatter(logging.Formatter("plugins: %(message)s"))
    plugins.handlers[:] = [steps] if trace else []
    plugins.setLevel(logging.DEBUG if trace else logging.WARNING)
    plugins.propagate = False
