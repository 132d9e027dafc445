"""The commands `quire chat` and `quire complete`."""

from __future__ import annotations

import sys
from typing import Annotated, Any, cast

import typer
from quire import ConfigError, RequestError, SamplingParams
from quire.commands import Chat, note, open_session

from quire_server.client.address import Address, listening_url
from quire_server.command import check_packages
from quire_server.settings import ServerSettings

SAMPLING = "Sampling"
Url = Annotated[str | None, typer.Option(metavar="URL", help="A running server; else the configured one.")]
Key = Annotated[str | None, typer.Option(help="Key of the server.", envvar="OPENAI_API_KEY")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="One of the served; else the first.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopP = Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(rich_help_panel=SAMPLING)]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer.", rich_help_panel=SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Makes the answer repeatable.", rich_help_panel=SAMPLING)]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer.", rich_help_panel=SAMPLING)]
Stats = Annotated[bool, typer.Option("--stats", help="Print tokens and speed after each answer.")]


def chat(
    context: typer.Context,
    url: Url = None,
    key: Key = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask the model to reason first.")] = None,
    stats: Stats = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Chat with a running server. Text that is piped in is one message, which is answered.

    Reasoning is written dimmed, or to standard error if the answer goes elsewhere than to a terminal.
    """
    check_packages()
    from quire_server.client.connection import Connection
    from quire_server.client.remote import RemoteTalker

    params = _params(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed, stop=stop)
    piped = None if sys.stdin.isatty() else _piped("message")
    with Connection(*find_server(context, url, key)) as connection:
        name = choose_model(connection.models(), model)
        talker = RemoteTalker(connection=connection, model=name, params=params, system=system, think=think, stats=stats)
        if piped is None:
            note(f"{name} at {connection.address.name}")
            Chat(talker).loop()
            return
        answer = talker.ask(piped)
        talker.finish_line()
        if answer.finish_reason == "abort":
            raise KeyboardInterrupt


def complete(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue; else stdin.")] = None,
    url: Url = None,
    key: Key = None,
    model: Model = None,
    stats: Stats = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Let a running server continue a text as it is, without a chat template."""
    check_packages()
    from quire_server.client.connection import Connection
    from quire_server.client.remote import sent_params, write_answer

    params = _params(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed, stop=stop)
    text = prompt if prompt is not None else _piped("prompt")
    with Connection(*find_server(context, url, key)) as connection:
        body = {"model": choose_model(connection.models(), model), "prompt": text, **sent_params(params)}
        answer = write_answer(connection, "/v1/completions", body)
    typer.echo()
    if stats:
        note(answer.summary())
    if answer.finish_reason == "abort":
        raise KeyboardInterrupt


def find_server(context: typer.Context, url: str | None, key: str | None) -> tuple[Address, str | None]:
    """The server that is meant, and the key for it.

    The configuration's own keys are for its own server only: another that is named does not get to see them.

    Raises:
        ConfigError: the URL, or the configuration, is wrong.
    """
    if url is not None:
        return Address.parse(url), key
    settings = cast(ServerSettings, open_session(context, {}).section("server"))
    if settings.uds is None and settings.port == 0:
        raise ConfigError("server.port is 0, any free one, so that it says nothing of where the server is",
                          remedy="name the server with --url")  # fmt: skip
    address = Address.parse(listening_url(settings, settings.port))
    try:
        return address, key or next(iter(sorted(settings.all_keys())), None)
    except OSError as error:
        raise ConfigError(f"server.api_keys_file: {error.strerror}: {error.filename}") from error


def choose_model(served: list[str], wanted: str | None) -> str:
    """The model that is meant. Raises RequestError if it is not served."""
    if wanted is None and served:
        return served[0]
    if wanted is None or wanted not in served:
        what = "no model" if wanted is None else f"no model {wanted!r}"
        raise RequestError(f"the server has {what}", remedy=f"it has {', '.join(served) or 'none'}")
    return wanted


def _piped(what: str) -> str:
    """Standard input without its last line end. Raises RequestError if there is nothing in it."""
    text = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise RequestError(f"there is no {what}: standard input is empty", remedy=f"pipe the {what} in")
    return text


def _params(**given: Any) -> SamplingParams:
    """Only what was given is said. Raises RequestError as SamplingParams does."""
    return SamplingParams(**{name: value for name, value in given.items() if value not in (None, [])})
