"""Turns scheduler updates into deltas for callers: text, log probabilities, stop strings, the final event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from quire.contract.request import FinishReason, Request, TokenLogprobs
from quire.contract.scheduling import RequestUpdate
from quire.engine.intake import Submission, sequence_id, sequence_index
from quire.outputs import Logprob, OutputDelta, PositionLogprobs
from quire.tokenizer import Tokenizer
from quire.tokenizer.detokenizer import IncrementalDetokenizer


@dataclass(slots=True)
class _Sequence:
    """One live sequence of a request."""

    group: _Group
    index: int
    request: Request
    detokenizer: IncrementalDetokenizer


@dataclass(slots=True)
class _Group:
    """A request's sequences; the last one to end carries the request's final event."""

    request_id: str
    num_prompt_tokens: int
    live: set[int] = field(default_factory=set)
    num_cached_tokens: int = 0


class Emission:
    """Keeps the text state of every live request.

    Args:
        tokenizer: for text.
        finish: called with (sequence id, reason) when a stop string ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, finish: Callable[[str, FinishReason], object]) -> None:
        self._tokenizer = tokenizer
        self._finish = finish
        self._sequences: dict[str, _Sequence] = {}
        self._groups: dict[str, _Group] = {}

    def begin(self, submission: Submission) -> None:
        """A request was accepted. Text of tokens that its sequences bring along has been told before."""
        key = submission.request_id
        group = self._groups[key] = _Group(key, len(submission.prompt_token_ids))
        for request in submission.sequences:
            detokenizer = IncrementalDetokenizer(self._tokenizer, submission.params, submission.prompt_token_ids)
            detokenizer.update(request.output_token_ids, finished=False)
            index = sequence_index(request.request_id)
            self._sequences[request.request_id] = _Sequence(group, index, request, detokenizer)
            group.live.add(index)

    def live_ids(self) -> list[str]:
        """Ids of the requests that have not had their final event."""
        return list(self._groups)

    def live_requests(self) -> list[Request]:
        """The scheduler's requests, one a sequence, that have not had their final event, in order of arrival."""
        return [sequence.request for sequence in self._sequences.values()]

    def sequence_ids(self, request_id: str) -> list[str]:
        """Ids of a request's sequences that have not ended; none if it is unknown, or has ended."""
        group = self._groups.get(request_id)
        return [] if group is None else [sequence_id(request_id, index) for index in sorted(group.live)]

    def process(self, updates: Iterable[RequestUpdate]) -> list[OutputDelta]:
        """Deltas for a step's updates, in order."""
        deltas = []
        for update in updates:
            sequence = self._sequences.get(update.request.request_id)
            if sequence is not None and _has_news(update):
                deltas.append(self._delta(sequence, update))
        return deltas

    def end(self, key: str, reason: FinishReason, error: str | None = None) -> OutputDelta | None:
        """End a sequence from outside; its held-back text comes out. None if it has ended already."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return None
        text = sequence.detokenizer.finish()
        return self._close(key, sequence, OutputDelta("", text=text), reason.value, None, error)

    def _delta(self, sequence: _Sequence, update: RequestUpdate) -> OutputDelta:
        request = update.request
        group = sequence.group
        group.num_cached_tokens = max(group.num_cached_tokens, request.num_cached_tokens, 0)
        reason = request.finish_reason
        piece = sequence.detokenizer.update(
            update.new_token_ids, finished=reason is not None, stopped=reason is FinishReason.STOP
        )
        count = len(update.new_token_ids) if piece.num_tokens is None else piece.num_tokens
        delta = OutputDelta(
            group.request_id,
            sequence.index,
            piece.text,
            update.new_token_ids[:count],
            self._positions(update.logprobs[:count]) if update.logprobs else None,
            self._positions(update.prompt_logprobs) if update.prompt_logprobs else (),
            num_prompt_tokens=group.num_prompt_tokens,
            num_cached_tokens=group.num_cached_tokens,
        )
        if piece.stop_string is not None:
            self._finish(request.request_id, FinishReason.STOP)
            return self._close(request.request_id, sequence, delta, "stop", piece.stop_string, None)
        if reason is not None:
            return self._close(request.request_id, sequence, delta, reason.value, request.stop_reason, update.error)
        return delta

    def _close(
        self,
        key: str,
        sequence: _Sequence,
        delta: OutputDelta,
        reason: str,
        stop_reason: int | str | None,
        error: str | None,
    ) -> OutputDelta:
        group = sequence.group
        del self._sequences[key]
        group.live.discard(sequence.index)
        if not group.live:
            del self._groups[group.request_id]
        return OutputDelta(
            group.request_id,
            sequence.index,
            delta.text,
            delta.token_ids,
            delta.logprobs,
            delta.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            finished=not group.live,
            num_prompt_tokens=group.num_prompt_tokens,
            num_cached_tokens=group.num_cached_tokens,
            error=error,
        )

    def _positions(self, entries: Sequence[TokenLogprobs]) -> tuple[PositionLogprobs, ...]:
        return tuple(self._position(entry) for entry in entries)

    def _position(self, entry: TokenLogprobs) -> PositionLogprobs:
        found: PositionLogprobs = {}
        for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            found[token] = Logprob(logprob, rank, self._tokenizer.token_text(token))
        found[entry.token_id] = Logprob(entry.logprob, entry.rank, self._tokenizer.token_text(entry.token_id))
        return found


def _has_news(update: RequestUpdate) -> bool:
    return bool(update.new_token_ids or update.prompt_logprobs or update.request.is_finished)
