"""`quire serve`: load the model, say where it is, serve until told to stop."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from socket import socket as Socket
from typing import Annotated, Any, cast

import typer
from quire import AsyncLLM, ConfigError
from quire.commands import (
    BUNDLED,
    Session,
    engine_flags,
    log_information,
    note,
    open_session,
    spare_what_stays,
    start_engine,
)
from quire.plugin import MetricsInit

from quire_server.client.address import listening_url
from quire_server.settings import ServerSettings

PANEL = "Server"
ENGINE_LOST = 70
"""Exit code of a server whose engine could not be kept alive; EX_SOFTWARE of sysexits.h."""
NEEDED = ("fastapi", "httpx", "orjson", "prometheus_client", "uvicorn")


def check_packages() -> None:
    """Raises ConfigError if the extra `server` is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'quire[server]'"
        raise ConfigError(f"serving needs packages that are not installed: {', '.join(missing)}", remedy=remedy)


@engine_flags("model")
def serve(
    context: typer.Context,
    options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", rich_help_panel=PANEL)] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any free one.", rich_help_panel=PANEL)] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket to listen on instead.", rich_help_panel=PANEL)] = None,
    served_name: Annotated[
        list[str] | None, typer.Option(help="Name under which the model is served.", rich_help_panel=PANEL)
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with one key per line.", rich_help_panel=PANEL)
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin that browsers may call from.", rich_help_panel=PANEL)
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS certificate.", rich_help_panel=PANEL)] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="TLS key.", rich_help_panel=PANEL)] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Most requests that wait or run.", rich_help_panel=PANEL)
    ] = None,
) -> None:
    """Serve a model through OpenAI's API. With no MODEL the bundled quire-tiny is served.

    All settings stand in the configuration's section `server` too, as in QUIRE_SERVER__PORT.
    """
    check_packages()
    log_information()
    options = options if model is None else {**options, "model": model}
    session = open_session(context, options, own_defaults={"process": True, "chat_template_timeout": 5})
    given = session.configured.sections.get("server", {})
    queue = None if max_requests is None else {**given.get("queue", {}), "max_requests": max_requests}
    settings = session.section(
        "server",
        host=host,
        port=port,
        uds=uds,
        served_names=tuple(served_name) if served_name else None,
        api_keys_file=api_keys_file,
        cors_origins=tuple(cors_origin) if cors_origin else None,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        queue=queue,
    )
    _serve(session, cast(ServerSettings, settings))


def _serve(session: Session, settings: ServerSettings) -> None:
    from quire_server.listener import check_tls, open_socket

    started = time.monotonic()
    if session.configured.config.model is None:
        note(f"no model named: serving the bundled {BUNDLED}")
    try:
        keys = settings.all_keys()
    except OSError as error:
        raise ConfigError(f"server.api_keys_file: {error.strerror}: {error.filename}") from error
    check_tls(settings)
    # Before the model is loaded: a port that is taken must not cost minutes.
    with open_socket(settings) as socket:
        _serve_on(socket, session, settings, has_key=bool(keys), started=started)


def _serve_on(socket: Socket, session: Session, settings: ServerSettings, *, has_key: bool, started: float) -> None:
    from quire_server.app import create_app
    from quire_server.listener import Listener
    from quire_server.metrics import PrometheusSink
    from quire_server.state import ServerState

    sink = PrometheusSink(MetricsInit(session.configured.config.model or BUNDLED))
    llm = start_engine(session, [("prometheus", sink)])
    try:
        state = ServerState(llm, settings, _shown_config(session, llm), sink.render)
        sink.watch(llm, state.admission.refused)
        url = listening_url(settings, 0 if settings.uds else socket.getsockname()[1])
        note(ready_block(llm, state.names, url, has_key=has_key, seconds=time.monotonic() - started))
        if settings.host not in ("127.0.0.1", "::1", "localhost") and settings.uds is None and not has_key:
            note("warning: anybody who reaches this address may use the server; set server.api_keys_file")
        listener = Listener(create_app(state), state)
        spare_what_stays()
        listener.serve_on(socket)
        if llm.cause_of_death is not None:
            raise typer.Exit(ENGINE_LOST)
    finally:
        llm.shutdown()


def _shown_config(session: Session, llm: AsyncLLM) -> dict[str, Any]:
    """Field -> value and origin."""
    values = llm.resolved_config()
    origins = session.configured.origins
    return {name: {"value": value, "origin": origins.get(name, "default")} for name, value in values.items()}


def ready_block(llm: AsyncLLM, names: tuple[str, ...], url: str, *, has_key: bool, seconds: float) -> str:
    """What a person wants to know when the server is up, with a line to paste."""
    info = llm.info
    tokens = (info.num_kv_blocks - 1) * info.block_size
    where = f"--unix-socket {url.removeprefix('unix:')} http://localhost" if url.startswith("unix:") else url
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_key else ""
    body = f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "What is 27+45?"}}]}}'
    return (
        f"ready in {seconds:.1f} s\n"
        f"  page      {url}/\n"
        f"  API       {url}/v1      (health: {url}/health, metrics: {url}/metrics)\n"
        f"  model     {names[0]}\n"
        f"  context   {info.max_model_len:,} tokens\n"
        f"  KV cache  {tokens:,} tokens, {tokens / info.max_model_len:.1f} requests of full length\n"
        f"  try       curl {where}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
