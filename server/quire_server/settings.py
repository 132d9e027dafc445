"""The configuration's section `server`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class QueueSettings(_Section):
    """What may wait for the engine; more is refused with 429."""

    max_requests: int = Field(default=1024, ge=1)
    """Most requests that wait or run at once."""
    max_tokens: int = Field(default=2_000_000, ge=1)
    """Most prompt tokens of those requests together."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds after which a request that has produced nothing yet is ended with 503."""


class DrainSettings(_Section):
    """What happens on SIGTERM."""

    grace: float = Field(default=0.0, ge=0)
    """Seconds in which new requests are still taken after /ready has turned 503, for a load balancer to notice."""
    timeout: float = Field(default=30.0, ge=0)
    """Seconds that running requests have to finish; those that have not are ended with an error."""


class ServerSettings(_Section):
    """Where and how to serve."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    uds: Path | None = None
    """Unix socket to listen on instead."""
    served_names: tuple[str, ...] = ()
    """Names under which the model is served; none: the checkpoint's."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys of which a request must bring one; none, here and in the file: no key is asked for."""
    api_keys_file: Path | None = None
    """File with one key per line."""
    cors_origins: tuple[str, ...] = ()
    """Origins that browsers may call from; `*` is all."""
    ssl_certfile: Path | None = None
    """TLS certificate."""
    ssl_keyfile: Path | None = None
    """TLS key."""
    max_body: int = Field(default=8 << 20, ge=1 << 10)
    """Most bytes of a request's body."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Most seconds of one request."""
    write_timeout: float = Field(default=60.0, gt=0)
    """Seconds that a client may take to read what has been sent before it is given up."""
    sse_keepalive: float = Field(default=15.0, gt=0)
    """Seconds of silence on a stream after which a comment is sent, so that proxies keep it open."""
    sse_pace: float = Field(default=0.05, ge=0, le=1)
    """Seconds that a stream's events may wait for others to go out with, at most: 0.4 ms per open stream; 0: never."""
    access_log: bool = True
    """Log one line per request."""
    quiet_paths: tuple[str, ...] = ("/health", "/ready", "/metrics")
    """Paths that are not logged."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector, such as http://localhost:4318/v1/traces; needs the extra `otel`."""
    queue: QueueSettings = QueueSettings()
    """Admission."""
    drain: DrainSettings = DrainSettings()
    """Shutting down."""

    def all_keys(self) -> frozenset[str]:
        """The keys of list and file. Raises OSError if the file cannot be read."""
        keys = {key.get_secret_value() for key in self.api_keys}
        if self.api_keys_file is not None:
            lines = self.api_keys_file.read_text(encoding="utf-8").splitlines()
            keys |= {line.strip() for line in lines if line.strip() and not line.startswith("#")}
        return frozenset(keys)

    def shown(self) -> dict[str, Any]:
        """Printable values, keys masked."""
        return self.model_dump(mode="json")
