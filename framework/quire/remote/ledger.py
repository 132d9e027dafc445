"""What the parent remembers of live requests, so that a new child can go on where the last one ended.

The token log is all that is needed: a sampled token depends on the request's seed and on its
position, so the tokens that follow are those that would have followed.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from quire.contract.request import FinishReason
from quire.engine.intake import Submission, sequence_index
from quire.errors import QuireError
from quire.outputs import OutputDelta
from quire.remote.messages import Add, WireSequence


@dataclass(slots=True)
class LiveSequence:
    """One sequence that has not ended.

    Attributes:
        token_ids: told so far. num_prompt_logprobs: entries told so far.
        to_skip: entries that a new child tells again.
    """

    token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    to_skip: int = 0


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request that has not had its final delta.

    Attributes:
        submission: as it was accepted. accepted: done when the child has taken it.
        sequences: index -> sequence, of those that have not ended.
        num_losses: children whose end may be its doing. num_cached_tokens: as told first.
    """

    submission: Submission
    accepted: Future[None] = field(default_factory=Future)
    sequences: dict[int, LiveSequence] = field(default_factory=dict)
    num_losses: int = 0
    num_cached_tokens: int = 0

    @classmethod
    def begin(cls, submission: Submission) -> LiveRequest:
        """A request that nothing has been told of."""
        indexes = [sequence_index(request.request_id) for request in submission.sequences]
        return cls(submission, sequences={index: LiveSequence() for index in indexes})

    def told(self, delta: OutputDelta) -> OutputDelta:
        """Note a delta; what of it is new."""
        sequence = self.sequences[delta.index]
        sequence.token_ids.extend(delta.token_ids)
        entries = delta.prompt_logprobs[sequence.to_skip :]
        sequence.to_skip -= len(delta.prompt_logprobs) - len(entries)
        sequence.num_prompt_logprobs += len(entries)
        if self.num_losses == 0:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.finish_reason is not None:
            del self.sequences[delta.index]
        if delta.num_cached_tokens == self.num_cached_tokens and len(entries) == len(delta.prompt_logprobs):
            return delta
        return replace(delta, prompt_logprobs=entries, num_cached_tokens=self.num_cached_tokens)

    def rewind(self) -> None:
        """The child that ran it has ended; another will tell again what was told of the prompt."""
        for sequence in self.sequences.values():
            sequence.to_skip = sequence.num_prompt_logprobs

    def message(self) -> Add:
        """What makes a child take the request up where it stands."""
        first = self.submission.sequences[0]
        has_begun = any(sequence.token_ids for sequence in self.sequences.values())
        forks = len(self.sequences) == len(self.submission.sequences) and not has_begun
        return Add(
            request_id=self.submission.request_id,
            prompt_token_ids=list(self.submission.prompt_token_ids),
            params=self.submission.params.model_dump(exclude_defaults=True),
            arrival_time=first.arrival_time,
            stop_token_ids=sorted(first.stop_token_ids),
            priority=first.priority,
            cache_salt=first.cache_salt,
            sequences=[
                WireSequence(
                    request_id=request.request_id,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    fork_of=request.fork_of if forks else None,
                    output_token_ids=self.sequences[index].token_ids,
                )
                for request in self.submission.sequences
                if (index := sequence_index(request.request_id)) in self.sequences
            ],
        )

    def end(self, reason: FinishReason, error: str | None = None) -> list[OutputDelta]:
        """End it from here; its final deltas."""
        indexes = sorted(self.sequences)
        self.sequences.clear()
        return [
            OutputDelta(
                self.submission.request_id,
                index,
                finish_reason=reason.value,
                finished=index == indexes[-1],
                num_prompt_tokens=len(self.submission.prompt_token_ids),
                num_cached_tokens=self.num_cached_tokens,
                error=error,
            )
            for index in indexes
        ]

    def settle(self, error: QuireError | None = None) -> bool:
        """Answer whoever waits for the acceptance; False if that has been done, or nobody waits."""
        if self.accepted.done() or not self.accepted.set_running_or_notify_cancel():
            return False
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)
        return True
