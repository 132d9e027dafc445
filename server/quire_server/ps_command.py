"""The command `quire ps`: what a running server serves, and how busy it is."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer
from quire import QuireError
from quire.commands import print_table

from quire_server.command import check_packages

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = 10.0
METRICS = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "cache": "kv_cache_usage_perc",
    "tokens": "generation_tokens_total",
}
SAMPLE = re.compile(r"^quire:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def ps(
    urls: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Servers.", show_default=False)] = None,
    key: Annotated[str | None, typer.Option(help="Key of the servers.", envvar="OPENAI_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what running servers serve. Without a URL: the one at 127.0.0.1:8000. Exit code 1 if one does not answer."""
    check_packages()
    found = [_look(url.rstrip("/").removesuffix("/v1"), key) for url in urls or [DEFAULT_URL]]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        columns = ("url", "model", "state", "running", "waiting", "cache", "tokens")
        print_table(tuple(map(str.upper, columns)), [tuple(str(row[name]) for name in columns) for row in found])
    if any(row["state"] == "no answer" for row in found):
        raise typer.Exit(1)


def _look(url: str, key: str | None) -> dict[str, Any]:
    """One server's row. Raises QuireError if it wants another key."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    row = dict.fromkeys(("model", "running", "waiting", "cache", "tokens"), "") | {"url": url, "state": "no answer"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT) as client:
            ready, models = client.get("/ready"), client.get("/v1/models")
            if models.status_code == 401:
                raise QuireError(f"{url} asks for a key", remedy="give it with --key, or in OPENAI_API_KEY")
            metrics = dict(SAMPLE.findall(client.get("/metrics").text))
            names = [model["id"] for model in models.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError):
        return row
    numbers = {name: float(metrics[metric]) for name, metric in METRICS.items() if metric in metrics}
    cache = f"{100 * numbers.pop('cache'):.1f} %" if "cache" in numbers else ""
    return row | {
        "model": ", ".join(names),
        "state": "ready" if ready.status_code == 200 else "leaving",
        "cache": cache,
        **{name: int(value) for name, value in numbers.items()},
    }
