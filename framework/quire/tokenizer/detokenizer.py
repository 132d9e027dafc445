"""Incremental text of one sequence: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.params import SamplingParams
from quire.tokenizer.tokenizer import Tokenizer

CONTEXT = 6
"""Prompt tokens that are decoded along, so that the first token keeps its leading space."""
INCOMPLETE = "\ufffd"
"""What decoders put where bytes do not make up a character yet."""
LIMIT = 32
"""Tokens that may wait for the end of a character; more is no text, and waiting would cost ever more."""
LONGEST = 4
"""Bytes of the longest character of UTF-8, and so the most tokens that one can be spread over."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What an update produced.

    Attributes:
        text: new text.
        stop_string: the stop string that ends the sequence, if one was met.
        num_tokens: how many of the update's tokens count; None: all. Fewer only with a stop string.
    """

    text: str = ""
    stop_string: str | None = None
    num_tokens: int | None = None


class IncrementalDetokenizer:
    """Text of one sequence, token by token. The pieces join to the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._decoder = _Decoder(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._num_tokens = 0

    def update(self, token_ids: Sequence[int], *, finished: bool, stopped: bool = False) -> Piece:
        """Take new tokens; with `finished`, held-back text comes out too.

        `stopped`: the last token ended the sequence, whose text it is part of only if stop strings are.
        """
        if not self._params.detokenize:
            return Piece()
        if stopped and not self._params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        text = ""
        for count, token in enumerate(token_ids, start=1):
            self._num_tokens += 1
            fresh, stop = self._feed(self._decoder.add(token))
            text += fresh
            if stop is not None:
                return Piece(text, stop, count)
        if finished:
            rest, stop = self._feed(self._decoder.flush())
            text += rest
            if stop is not None:
                return Piece(text, stop, len(token_ids))
            text += self._stops.flush()
        return Piece(text)

    def finish(self) -> str:
        """What is still held back."""
        return self.update((), finished=True).text

    def _feed(self, text: str) -> tuple[str, str | None]:
        # A stop string may begin among the first `min_tokens` tokens, but not end there.
        return self._stops.feed(text, armed=self._num_tokens > self._params.min_tokens)


class _Decoder:
    """Decodes a sliding window: the tokens of the last emitted piece give the context for the next."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._silent = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window = list(prompt_token_ids[-CONTEXT:])
        self._done = len(self._window)
        self._before: str | None = None

    def add(self, token: int) -> str:
        if token in self._silent:
            return ""
        if self._before is not None and self._done == len(self._window) and (text := self._alone(token)):
            self._window, self._done, self._before = [token], 1, text
            return text
        self._window.append(token)
        text = self._fresh(len(self._window))
        if not text or text.endswith(INCOMPLETE):
            return self._overdue(text) if len(self._window) - self._done > LIMIT else ""
        self._advance(len(self._window))
        return text

    def _alone(self, token: int) -> str:
        """What the token adds to whole characters, where that is its own text whatever they are; else nothing."""
        if not self._tokenizer.is_bytewise or self._before is None or self._before.endswith(INCOMPLETE):
            return ""
        text = self._tokenizer.token_text(token, skip_special_tokens=self._skip)
        return "" if INCOMPLETE in text else text

    def flush(self) -> str:
        text = self._fresh(len(self._window))
        self._advance(len(self._window))
        return text

    def _fresh(self, end: int) -> str:
        """Text of the window's tokens up to `end` that has not been given out."""
        if self._before is None:
            self._before = self._decode(self._window[: self._done])
        before, whole = self._before, self._decode(self._window[:end])
        if not whole.startswith(before):
            before = before.rstrip(INCOMPLETE)  # the prompt ended within a character, which is complete now
        return whole[len(before) :]

    def _advance(self, end: int) -> None:
        """All up to `end` is given out; its last piece stays as context."""
        self._window = self._window[self._done :]
        self._done = end - self._done
        # A lone token, as pieces nearly always are, has the same text each time it is met.
        lone = self._window[0] if self._done == 1 else None
        self._before = None if lone is None else self._tokenizer.token_text(lone, skip_special_tokens=self._skip)

    def _overdue(self, text: str) -> str:
        """Let go of waiting tokens that can no longer become part of a character."""
        if not text:  # ids without text, such as those that pad a vocabulary
            del self._window[self._done :]
            return ""
        for end in range(len(self._window) - LONGEST, self._done, -1):
            early = self._fresh(end)
            if early and text.startswith(early):
                self._advance(end)
                return early
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class StopStrings:
    """Finds stop strings in text that arrives in pieces; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was met or None); unless `armed`, none is met yet."""
        if not self._stops:
            return text, None
        whole, old = self._held + text, len(self._held)
        # None may end within what is held: if one does, it came before the first armed piece.
        ends = ((whole.find(stop, max(0, old + 1 - len(stop))), stop) for stop in self._stops)
        found = [(at, stop) for at, stop in ends if armed and at >= 0]
        if found:
            # The one that is complete first, as if the text had come letter by letter.
            at, stop = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            self._held = ""
            return whole[: at + len(stop) if self._include else at], stop
        keep = self._longest_start(whole)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], None

    def flush(self) -> str:
        """What is held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
