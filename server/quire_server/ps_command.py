"""The command `quire ps`: what a running server serves, and how busy it is."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer
from quire import QuireError
from quire.commands import print_table

from quire_server.client.address import Address
from quire_server.client.commands import find_server
from quire_server.command import check_packages

TIMEOUT = 10.0
METRICS = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "cache": "kv_cache_usage_perc",
    "tokens": "generation_tokens_total",
}
SAMPLE = re.compile(r"^quire:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


COLUMNS = ("url", "model", "state", "running", "waiting", "cache", "tokens", "context", "version")


def ps(
    context: typer.Context,
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="[URL]...", help="Servers: URLs, or ports here.", show_default=False)
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key of the servers.", envvar="OPENAI_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what running servers serve. Without a URL: the configured one. Exit code 1 if one does not answer."""
    check_packages()
    asked = [find_server(context, url, key) for url in urls] if urls else [find_server(context, None, key)]
    found = [_look(address, its_key) for address, its_key in asked]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_table(tuple(map(str.upper, COLUMNS)), [tuple(str(row[name]) for name in COLUMNS) for row in found])
    if any(row["state"] == "no answer" for row in found):
        raise typer.Exit(1)


def _look(address: Address, key: str | None) -> dict[str, Any]:
    """One server's row, empty where it does not say. Raises QuireError if it wants another key."""
    import httpx

    from quire_server.client.connection import authorization

    row = dict.fromkeys((*COLUMNS, "kv_tokens", "plugins"), "") | {"url": address.name, "state": "no answer"}
    transport = None if address.uds is None else httpx.HTTPTransport(uds=address.uds)
    headers = authorization(key)
    try:
        with httpx.Client(base_url=address.base, headers=headers, timeout=TIMEOUT, transport=transport) as client:
            ready, models = client.get("/ready"), client.get("/v1/models")
            if models.status_code == 401:
                raise QuireError(f"{address.name} asks for a key", remedy="give it with --key, or in OPENAI_API_KEY")
            names = [model["id"] for model in models.json()["data"]]
            numbers, info = _numbers(client.get("/metrics").text), client.get("/server_info")
    except (httpx.HTTPError, ValueError, KeyError):
        return row
    return row | {
        "model": ", ".join(names),
        "state": "ready" if ready.status_code == 200 else "leaving",
        **numbers,
        **(_told(info.json()) if info.status_code == 200 else {}),
    }


def _numbers(text: str) -> dict[str, Any]:
    metrics = dict(SAMPLE.findall(text))
    found: dict[str, Any] = {
        name: int(float(metrics[metric])) for name, metric in METRICS.items() if metric in metrics and name != "cache"
    }
    if (used := metrics.get(METRICS["cache"])) is not None:
        found["cache"] = f"{100 * float(used):.1f} %"
    return found


def _told(info: Any) -> dict[str, Any]:
    """What /server_info adds; nothing if it is another program's."""
    try:
        pool = info["kv_cache"]
        # The pool's first block holds no request.
        found = {"kv_tokens": (pool["num_blocks"] - 1) * pool["block_size"], "plugins": info["plugins"]}
        return found | {"context": info["max_model_len"], "version": info["version"]}
    except (KeyError, TypeError):
        return {}
