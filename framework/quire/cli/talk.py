"""Sends a conversation to the engine and writes the answer as it is made."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

from quire.cli.console import note
from quire.contract.parsing import OutputParser, ParserEvent, ParserInit, ReasoningDelta, TextDelta, ToolCallStart
from quire.engine.engine import Engine
from quire.errors import EngineError
from quire.outputs import OutputDelta
from quire.params import SamplingParams
from quire.parsers.plain import PlainParser

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that steer a terminal: a model's text must not move the cursor or ring the bell."""


@dataclass(slots=True)
class Answer:
    """What came of one question. Times are seconds."""

    text: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    def summary(self) -> str:
        """One line of figures."""
        decode = self.total_s - self.first_token_s
        speed = (self.num_output_tokens - 1) / decode if self.num_output_tokens > 1 and decode > 0 else 0.0
        return (
            f"{self.num_prompt_tokens} tokens in ({self.num_cached_tokens} cached), {self.num_output_tokens} out; "
            f"first after {self.first_token_s:.2f} s, then {speed:.1f} tokens/s; ended by {self.finish_reason}"
        )


@dataclass
class Talker:
    """One conversation.

    Attributes:
        engine: answers.
        params: sampling of the next answer.
        system: system message. think: whether to ask for reasoning; None: as the template does.
        raw: send the text as it is, without the template and without a memory.
        stats: write a line of figures after each answer.
        messages: the turns so far, without the system message.
    """

    engine: Engine
    params: SamplingParams
    system: str | None = None
    think: bool | None = None
    raw: bool = False
    stats: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: Answer | None = None
    _count: int = 0
    _line_open: bool = False

    def ask(self, text: str) -> Answer:
        """Write the answer to stdout. Interrupting stops the answer and keeps what there is of it.

        Raises:
            RequestError: the conversation does not fit, or the template refuses it; it is left as it was.
            EngineError: the step failed.
        """
        turn = {"role": "user", "content": text}
        prompt, parser = self._prompt([*self.messages, turn], text)
        answer = self._answer(prompt, parser)
        if not self.raw:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        self.last = answer
        self._line_open = bool(answer.text) and not answer.text.endswith("\n")
        if self.stats:
            self.finish_line()
            note(answer.summary())
        return answer

    def finish_line(self) -> None:
        """End the answer's line on stdout, unless it has ended."""
        if self._line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._line_open = False

    def reset(self) -> None:
        """Forget the turns."""
        self.messages.clear()
        self.last = None

    def _prompt(self, messages: Sequence[dict[str, Any]], text: str) -> tuple[str | list[int], OutputParser]:
        chat = self.engine.parts.chat
        has_template = chat.tokenizer.chat_template is not None
        if self.raw:
            return text, PlainParser(ParserInit())
        if not has_template and not self.messages and self.system is None:
            return text, chat.new_parser()
        full = [{"role": "system", "content": self.system}, *messages] if self.system is not None else list(messages)
        arguments: dict[str, Any] = {} if self.think is None else {"enable_thinking": self.think}
        prompt = chat.prompt(full, **arguments)
        return list(prompt.token_ids), chat.new_parser(in_reasoning=prompt.in_reasoning)

    def _answer(self, prompt: str | list[int], parser: OutputParser) -> Answer:
        answer, writer, started = Answer(), Writer(), time.perf_counter()
        with Interrupt() as interrupt:
            for delta in self._deltas(prompt, interrupt):
                if delta.token_ids and not answer.num_output_tokens:
                    answer.first_token_s = time.perf_counter() - started
                answer.num_output_tokens += len(delta.token_ids)
                answer.num_prompt_tokens, answer.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
                answer.finish_reason = delta.finish_reason
                events = parser.feed(delta.text, delta.token_ids)
                answer.text += writer.write(events if not delta.finished else [*events, *parser.finish()])
                if delta.finish_reason == "error":
                    raise EngineError(f"the answer failed: {delta.error}")
        writer.end()
        answer.total_s = time.perf_counter() - started
        return answer

    def _deltas(self, prompt: str | list[int], interrupt: Interrupt) -> Iterator[OutputDelta]:
        self._count += 1
        request_id = f"chat-{self._count}"
        self.engine.add(self.engine.prepare(request_id, prompt, self.params))
        finished = False
        try:
            while not finished:
                ended = self.engine.abort(request_id) if interrupt.requested else []
                for delta in [*ended, *self.engine.step()]:
                    finished = finished or delta.finished
                    yield delta
        finally:
            if not finished:  # the reader failed, or left
                self.engine.abort(request_id)


class Writer:
    """Writes events: answers to stdout; reasoning dimmed, to stderr if stdout is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._reasoned = False

    def write(self, events: Sequence[ParserEvent]) -> str:
        """Write, and return what was part of the answer."""
        answer = ""
        for event in events:
            if isinstance(event, ReasoningDelta):
                self._reason(event.text)
                continue
            text = event.text if isinstance(event, TextDelta) else ""
            if not isinstance(event, TextDelta):
                text = f"\n[tool call] {event.name} " if isinstance(event, ToolCallStart) else event.text
            self._separate()
            sys.stdout.write(shown(text) if self._terminal else text)
            answer += text
        sys.stdout.flush()
        return answer

    def end(self) -> None:
        """End a reasoning that no answer followed."""
        self._separate()

    def _reason(self, text: str) -> None:
        stream = sys.stdout if self._terminal else sys.stderr
        stream.write(f"{DIM}{shown(text)}{PLAIN}" if stream.isatty() else text)
        stream.flush()
        self._reasoned = True

    def _separate(self) -> None:
        if self._reasoned:
            stream = sys.stdout if self._terminal else sys.stderr
            stream.write("\n")
            stream.flush()
            self._reasoned = False


def shown(text: str) -> str:
    """The text as a terminal may have it, control characters replaced."""
    return text.translate(CONTROLS)


class Interrupt:
    """Turns the first Ctrl-C into a request to stop, so that no step is cut in two; the second ends the program."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
