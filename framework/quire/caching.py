"""Where plugins keep what they made and can make again."""

from __future__ import annotations

from pathlib import Path

from quire.config import special_variable


def cache_folder(name: str) -> Path:
    """The folder of a plugin's files that may be deleted at any time, such as compiled kernels; it may not exist yet.

    It lies in QUIRE_CACHE_DIR, or in the user's cache. Args: name: the plugin's name.
    """
    chosen = special_variable("QUIRE_CACHE_DIR")
    base = Path(chosen) if chosen else Path.home() / ".cache" / "quire"
    return base / "plugins" / name
