"""`quire run`: one answer, or a chat, in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.cli.chat import Chat
from quire.cli.console import note
from quire.cli.flags import engine_flags
from quire.cli.session import open_session
from quire.cli.talk import Talker
from quire.engine.build import engine_from
from quire.errors import RequestError
from quire.loader.checkpoint import BUNDLED, HUB_ID
from quire.params import SamplingParams, sampling_defaults

SAMPLING = "Sampling"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(run)


@engine_flags("model", "process", "step_timeout")
def run(
    context: typer.Context,
    options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask the model to reason first.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print tokens and speed after each answer.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=SAMPLING)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", rich_help_panel=SAMPLING)] = None,
) -> None:
    """Answer one prompt, or chat. With no MODEL the bundled quire-tiny answers.

    A prompt may also be piped in. A single argument that can be no model's name, since it has spaces
    in it for instance, is the prompt: quire run "What is 12 + 30?"
    """
    if model is not None and prompt is None and not names_a_model(model):
        model, prompt = None, model
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise RequestError("there is no prompt: standard input is empty", remedy="quire run MODEL PROMPT")
    session = open_session(context, options if model is None else {**options, "model": model})
    if session.configured.config.model is None:
        note(f"no model named: using the bundled {BUNDLED}")
    engine = engine_from(session.configured, session.host)
    try:
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens}
        generation = engine.parts.config.checkpoint.generation_config
        chosen = {name: value for name, value in given.items() if value is not None}
        params = SamplingParams(**({"max_tokens": None} | sampling_defaults(generation) | chosen))
        talker = Talker(engine, params=params, system=system, think=think, raw=raw, stats=stats)
        if prompt is not None:
            answer = talker.ask(prompt)
            talker.finish_line()
            if answer.finish_reason == "abort":
                raise KeyboardInterrupt
        else:
            Chat(talker).loop()
    finally:
        engine.shutdown()


def names_a_model(text: str) -> bool:
    """Whether the text is a path, or could be a Hugging Face id."""
    return Path(text).exists() or text.startswith((".", "/", "~")) or HUB_ID.fullmatch(text) is not None
