"""The chat: a prompt, answers, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pydantic import BaseModel

from quire.cli.console import note, print_error
from quire.cli.conversation import Conversation
from quire.config_values import parse_yaml
from quire.errors import EngineError, RequestError
from quire.host.suggest import suggest
from quire.params import SamplingParams

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message, and forget the conversation; without TEXT: remove it",
    "/think on|off": "ask the model to reason first, or not to",
    "/set NAME=VALUE ...": "change sampling, such as temperature=0.2 max_tokens=100; without: show it",
    "/stats": "figures of the last answer and of the KV cache",
    "/exit": "leave; so do /quit, Ctrl-D, and Ctrl-C twice",
}


class Leave(Exception):
    """The user wants to leave."""


class Chat:
    """Reads lines from the terminal until the user leaves."""

    def __init__(self, talker: Conversation, read: Callable[[str], str] = input) -> None:
        self._talker = talker
        self._read = read
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/think": self._think,
            "/set": self._set,
            "/stats": self._stats,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def loop(self) -> None:
        """Chat. Ctrl-C stops an answer; a second one, or two at the prompt, raise KeyboardInterrupt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        note("type a message, /help for commands, /exit to leave")
        interrupted = False
        while True:
            try:
                line = self._read(">>> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                note("\npress Ctrl-C again or type /exit to leave")
                continue
            try:
                if line:
                    interrupted = self.handle(line)
            except Leave:
                return

    def handle(self, line: str) -> bool:
        """Answer one line or carry out its command; True if the answer was interrupted. Raises Leave."""
        try:
            if line.startswith("/"):
                self._command(line)
                return False
            answer = self._talker.ask(line)
            self._talker.finish_line()
            if answer.finish_reason == "abort":
                note("stopped")
            return answer.finish_reason == "abort"
        except (RequestError, EngineError) as error:
            print_error(error.message, error.remedy)
            return False

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise RequestError(f"there is no command {name!r}", remedy=suggest(name, self._commands))
        self._commands[name](rest.strip())

    def _help(self, rest: str) -> None:
        for usage, meaning in HELP.items():
            note(f"{usage:<22} {meaning}")

    def _reset(self, rest: str) -> None:
        self._talker.reset()
        note("the conversation is forgotten")

    def _system(self, rest: str) -> None:
        self._talker.system = rest or None
        self._talker.reset()
        note("system message set" if rest else "no system message")

    def _think(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise RequestError(f"/think takes on or off, not {rest!r}")
        self._talker.think = rest == "on"
        note(f"thinking is {rest}")

    def _set(self, rest: str) -> None:
        pairs = dict(_pair(item) for item in rest.split())
        if pairs:
            self._talker.set_params(changed(self._talker.params, pairs))
        note(", ".join(f"{name}={value!r}" for name, value in _said(self._talker.params).items()) or "all defaults")

    def _stats(self, rest: str) -> None:
        answer = self._talker.last
        note(answer.summary() if answer is not None else "no answer yet")
        for line in self._talker.figures():
            note(line)

    def _exit(self, rest: str) -> None:
        raise Leave


def changed(params: SamplingParams, pairs: dict[str, str]) -> SamplingParams:
    """The parameters with some of them replaced. Raises RequestError as SamplingParams does."""
    return SamplingParams(**(_said(params) | {name: parse_yaml(text) for name, text in pairs.items()}))


def _said(params: BaseModel) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.model_fields_set}


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise RequestError(f"/set takes NAME=VALUE, not {item!r}")
    return name, value
