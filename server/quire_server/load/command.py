"""The command `quire bench serve`."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from quire import ConfigError, EngineError, QuireError
from quire.commands import print_table
from tqdm import tqdm

from quire_server.client.commands import Key, Model, Url, choose_model, find_server
from quire_server.command import check_packages
from quire_server.load.figures import Trace, parse_objectives, summarize
from quire_server.load.plan import arrivals as due_times
from quire_server.load.plan import file_prompts, planned, random_prompts, random_text
from quire_server.load.report import report_rows, told

if TYPE_CHECKING:
    from quire_server.client.connection import Connection

WARM_UP: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "warm-up"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "warm-up"}]},
}
LOAD = "Load"


def bench_serve(
    context: typer.Context,
    url: Url = None,
    key: Key = None,
    model: Model = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.", rich_help_panel=LOAD)] = 32,
    rate: Annotated[
        float, typer.Option(metavar="PER_SECOND", help="Requests per second; inf: all at once.", rich_help_panel=LOAD)
    ] = 4.0,
    arrivals: Annotated[
        Literal["poisson", "constant"], typer.Option(help="How they are spread.", rich_help_panel=LOAD)
    ] = "poisson",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most at once; without: no limit.", rich_help_panel=LOAD)
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.", rich_help_panel=LOAD)] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Most output tokens.", rich_help_panel=LOAD)] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts instead of random ones: lines, or .jsonl.", rich_help_panel=LOAD),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and sampling.", rich_help_panel=LOAD)] = 0,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Silence that ends a request.", rich_help_panel=LOAD)
    ] = 600.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MS", help="Objective for goodput: ttft, tpot or e2e; repeatable."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write figures and every request's times.")
    ] = None,
) -> None:
    """Put load on a running server, and measure how it answers.

    Requests are sent when they are due, whether or not those before have been answered, so that a slow
    server cannot slow the load down. Random prompts differ from their first token on, and are answered
    with exactly --output-len tokens.
    """
    check_packages()
    from quire_server.client.connection import Connection, async_client
    from quire_server.load.runner import run_load

    if not rate > 0:
        raise ConfigError(f"--rate is {rate}; it must be above 0, or inf")
    objectives = parse_objectives(slo or ())
    given = None if prompts is None else file_prompts(prompts)
    address, key = find_server(context, url, key)
    with Connection(address, key) as connection:
        name = choose_model(connection.models(), model)
        found = given or random_prompts(_pool(connection, name, seed), input_len, seed)
        times = due_times(rate, arrivals, seed)
        plan = planned(found, times, requests, model=name, max_tokens=output_len, seed=seed)
        # A server that refuses the load says so at once, and no first answer's costs are measured.
        for _ in connection.stream(plan[0].path, {**WARM_UP[plan[0].path], "model": name, "max_tokens": 1}):
            pass

    async def run() -> list[Trace]:
        async with async_client(address, key, timeout) as client:
            with tqdm(total=len(plan), unit="request") as bar:
                return await run_load(client, plan, concurrency, lambda trace: _advance(bar))

    traces = asyncio.run(run())
    report = summarize(traces, objectives)
    if json_file is not None:
        load = {"url": address.name, "model": name, "rate": str(rate), "arrivals": arrivals, "seed": seed}
        load |= {"concurrency": concurrency, "output_len": output_len}
        load |= {"input_len": input_len} if prompts is None else {"prompts": str(prompts)}
        written = {"load": load, "report": report.as_json(), "requests": [asdict(trace) for trace in traces]}
        json_file.write_text(json.dumps(written, indent=1))
    for line in told(report):
        typer.echo(line)
    print_table(("MS", "MEAN", "P50", "P90", "P99", "MAX"), report_rows(report))
    if not report.num_answered:
        raise EngineError("no request was answered", remedy="look into the server's log")


def _advance(bar: Any) -> None:
    bar.update()


def _pool(connection: Connection, model: str, seed: int) -> list[int]:
    """Tokens that the server's own tokenizer makes of letters and digits. Raises QuireError if it does not tell."""
    body = {"model": model, "prompt": random_text(seed), "add_special_tokens": False}
    try:
        return list(connection.post("/tokenize", body)["tokens"])
    except (QuireError, KeyError, TypeError) as error:
        message = f"random prompts need the server's /tokenize: {error}"
        raise QuireError(message, remedy="give prompts in a file, with --prompts") from error
