"""Lets the engine in this process answer a conversation."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from quire.cli.conversation import Answer, Conversation, Writer
from quire.contract.parsing import OutputParser, ParserInit
from quire.engine.engine import Engine
from quire.errors import EngineError
from quire.outputs import OutputDelta
from quire.parsers.plain import PlainParser


@dataclass
class Talker(Conversation):
    """A conversation with an engine.

    Attributes:
        engine: answers.
        raw: send the text as it is, without the template and without a memory.
    """

    engine: Engine
    raw: bool = False
    _count: int = 0

    @property
    def remembers(self) -> bool:
        return not self.raw

    def figures(self) -> list[str]:
        stats = self.engine.kv_stats()
        return [f"KV blocks: {stats.used} used, {stats.cached} cached, {stats.free} free of {stats.total}"]

    def answer(self, messages: Sequence[dict[str, Any]]) -> Answer:
        prompt, parser = self._prompt(messages)
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

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[str | list[int], OutputParser]:
        chat = self.engine.parts.chat
        text: str = messages[-1]["content"]
        has_template = chat.tokenizer.chat_template is not None
        if self.raw:
            return text, PlainParser(ParserInit())
        if not has_template and len(messages) == 1 and self.system is None:
            return text, chat.new_parser()
        arguments: dict[str, Any] = {} if self.think is None else {"enable_thinking": self.think}
        prompt = chat.prompt(self.with_system(messages), **arguments)
        return list(prompt.token_ids), chat.new_parser(in_reasoning=prompt.in_reasoning)

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
