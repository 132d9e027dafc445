"""Where a server is: a URL as a person types it, or the one that the configuration serves on."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from quire import ConfigError

from quire_server.settings import ServerSettings

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class Address:
    """A server.

    Attributes:
        name: as people are shown it.
        base: URL that paths are put behind.
        uds: the Unix socket to connect to instead of the URL's host.
    """

    name: str
    base: str
    uds: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `http://host:port`, `host:port`, `port` or `unix:PATH`; a final `/v1` is dropped.

        Raises:
            ConfigError: the text is none of these.
        """
        given = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
        if given.startswith("unix:") and len(given) > len("unix:"):
            return cls(given, "http://localhost", given.removeprefix("unix:"))
        url = f"127.0.0.1:{given}" if given.isascii() and given.isdigit() else given
        url = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(url)
            is_fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number, or too large; the brackets of an IPv6 address do not match
            is_fine = False
        if not is_fine or parts.query or parts.fragment or " " in url or url.endswith(":"):
            raise ConfigError(f"{text!r} is not a server's URL", remedy="write it as in http://127.0.0.1:8000")
        return cls(url, url)

    def remedy(self) -> str:
        """What to do if nobody answers here."""
        if self.uds is not None:
            return f"start one with `quire serve --uds {self.uds}`, or name another with --url"
        parts = urlsplit(self.base)
        if parts.hostname not in LOOPBACK:
            return "check the URL, and that `quire serve` runs there and listens on that address (--host)"
        port = "" if parts.port == ServerSettings.model_fields["port"].default else f" --port {parts.port or 80}"
        return f"start one with `quire serve{port}`, or name another with --url"


def listening_url(settings: ServerSettings, port: int) -> str:
    """Where clients on this machine find a server with these settings; `port` is what it really listens on."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http{'s' if settings.ssl_certfile else ''}://{host}:{port}"
