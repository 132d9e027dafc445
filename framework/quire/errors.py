"""Every error that Quire raises on purpose.

    QuireError                    exit code 1
    ├── ConfigError               exit code 2: what the operator wrote cannot be run
    │   ├── UnsupportedModel      the checkpoint needs something that nothing here provides
    │   ├── ModelNotFound         exit code 3: no checkpoint under that name, or no access to it
    │   └── OutOfMemory           exit code 4: the model or its KV cache does not fit
    ├── RequestError              the caller of one request is at fault (a 4xx); the engine goes on
    ├── PluginError               a plugin broke its contract; names plugin, distribution, version
    └── EngineError               the engine is at fault (a 5xx)
        └── EngineDead            the engine's loop has ended; nothing more can be served

A message says what is wrong, which value, and what is allowed; `remedy` says how to mend it.
"""

from __future__ import annotations

from typing import ClassVar


class QuireError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: one line of cause.
        remedy: one line that says what to do; empty when there is nothing to say.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class ConfigError(QuireError):
    """The configuration, or what it names, cannot be run."""

    exit_code = 2


class UnsupportedModel(ConfigError):
    """The checkpoint needs an architecture or feature that no loaded plugin provides."""


class ModelNotFound(ConfigError):
    """The named checkpoint does not exist, or may not be read."""

    exit_code = 3


class OutOfMemory(ConfigError):
    """The weights or the KV cache do not fit into the device's memory."""

    exit_code = 4


class RequestError(QuireError, ValueError):
    """One request cannot be honoured; `param` names the field at fault, if one is."""

    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.param = param


class PluginError(QuireError):
    """A plugin failed or broke its contract."""


class EngineError(QuireError):
    """A step of the engine failed through no fault of the caller."""


class EngineDead(EngineError):
    """The engine's loop has ended; requests in flight received this, new ones are refused."""
