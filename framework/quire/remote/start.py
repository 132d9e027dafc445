"""Starts an engine for a server, here or in a child process, as the configuration says."""

from __future__ import annotations

from quire.config import Configured
from quire.engine.build import engine_from
from quire.engine.served import ServedEngine
from quire.registry import PluginHost


def served_engine(configured: Configured, host: PluginHost) -> ServedEngine:
    """An engine that is ready to serve. Raises ConfigError."""
    if not configured.config.process:
        return engine_from(configured, host)
    from quire.remote.engine import RemoteEngine

    return RemoteEngine(configured, host)
