"""The `quire` program."""

from quire.cli.app import main

__all__ = ["main"]
