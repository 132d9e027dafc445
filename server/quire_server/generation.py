"""Runs a request's submissions and tells what they produce, as events."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from quire import AsyncLLM, OutputDelta, PositionLogprobs, QuireError, Submission
from quire.plugin import OutputParser, ParserEvent, ReasoningDelta, TextDelta, ToolCallStart

from quire_server.events import (
    Choice,
    Event,
    Failure,
    Finish,
    Prompt,
    Reasoning,
    Text,
    Tokens,
    ToolArguments,
    ToolStart,
    Usage,
    Whole,
)

logger = logging.getLogger("quire.server")

Tell = Callable[[Sequence[Event]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run.

    Attributes:
        submissions: one per prompt, each of n sequences; choices are numbered prompt by prompt.
        parsers: one per choice; empty: the text is the answer as it is.
        tell_prompts: whether `Prompt` events are wanted.
        queue_timeout: seconds until something must have been produced. timeout: until it must have ended.
    """

    submissions: Sequence[Submission]
    parsers: Sequence[OutputParser] = ()
    tell_prompts: bool = False
    queue_timeout: float = 60.0
    timeout: float = 600.0

    @property
    def num_choices(self) -> int:
        return sum(submission.params.n for submission in self.submissions)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(submission.prompt_token_ids) for submission in self.submissions)


async def generate(llm: AsyncLLM, job: Job, tell: Tell, failed: Callable[[str], None]) -> None:
    """Run a job. What it produces is told as it comes, in the event loop: in order, what came together at once; last
    one `Usage`, or one `Failure`, of which `failed` is told if the engine gave it. Cancelling it aborts what runs."""
    tally = _Tally(job)
    now = asyncio.get_running_loop().time()
    end = now + job.timeout
    try:
        async with asyncio.timeout_at(min(now + job.queue_timeout, end)) as limit:

            def take(prompt: int, delta: OutputDelta) -> None:
                if not tally.has_begun:
                    limit.reschedule(end)
                events = tally.take(prompt, delta)
                if events and isinstance(last := events[-1], Failure):
                    raise _Failed(events, last.message)
                tell(events)

            await _run_all(llm, job.submissions, take)
        tell([tally.usage()])
    except _Failed as found:
        failed(found.message)
        tell(found.events)
    except TimeoutError:
        problem = "took too long" if tally.has_begun else "waited too long for its turn"
        tell([Failure(f"the request {problem} and was ended")])
    except QuireError as error:
        tell([Failure(error.message)])
    except Exception as error:
        # A parser is a plugin's, and reads what a model wrote: what it breaks is this request alone.
        logger.exception("an output could not be read")
        tell([Failure(f"the output could not be read: {type(error).__name__}")])


class _Failed(Exception):
    """A delta said that nothing more will come; `events` end with the `Failure`, whose message this is."""

    def __init__(self, events: Sequence[Event], message: str) -> None:
        super().__init__(message)
        self.events, self.message = events, message


async def _run_all(llm: AsyncLLM, submissions: Sequence[Submission], take: Callable[[int, OutputDelta], None]) -> None:
    """Run submissions side by side; `take` gets each delta with its submission's index. The first error ends all."""
    if len(submissions) == 1:
        await llm.run(submissions[0], partial(take, 0))
        return
    tasks = [asyncio.create_task(llm.run(each, partial(take, index))) for index, each in enumerate(submissions)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def whole(job: Job, produced: Iterable[Event]) -> Whole:
    """All events of a job, put together."""
    result = Whole([Choice() for _ in range(job.num_choices)])
    for event in produced:
        result.add(event)
    return result


class _Tally:
    """Turns deltas into events, and counts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        counts = [submission.params.n for submission in job.submissions]
        self._first = [sum(counts[:index]) for index in range(len(counts))]
        self.open_choices = set(range(sum(counts)))
        self.has_begun = False
        self._calls = dict.fromkeys(self.open_choices, 0)
        self._reasoning = dict.fromkeys(self.open_choices, False)
        self._told: set[int] = set()
        self._prompt_logprobs: dict[int, list[PositionLogprobs | None]] = {}
        self._completion = self._reasoning_tokens = 0
        self._cached = [0] * len(counts)

    def take(self, prompt: int, delta: OutputDelta) -> list[Event]:
        """Events of one delta."""
        choice = self._first[prompt] + delta.index
        self.has_begun = True
        self._cached[prompt] = max(self._cached[prompt], delta.num_cached_tokens)
        if delta.finish_reason == "error":
            return [Failure(delta.error or "the engine failed")]
        events, output = self._prompt(prompt, delta), self._output(choice, delta)
        if delta.token_ids:
            self._completion += len(delta.token_ids)
            alone = not output and delta.finish_reason is None
            events.append(Tokens(choice, delta.token_ids, delta.logprobs, self._num_shown(prompt, delta), alone))
        events += output
        if delta.finish_reason == "abort":
            events.append(Failure("the request was aborted"))
        elif delta.finish_reason is not None:
            self.open_choices.discard(choice)
            reason = "tool_calls" if self._calls[choice] and delta.finish_reason == "stop" else delta.finish_reason
            events.append(Finish(choice, reason, delta.stop_reason))
        return events

    def usage(self) -> Usage:
        return Usage(self._job.num_prompt_tokens, self._completion, sum(self._cached), self._reasoning_tokens)

    def _num_shown(self, prompt: int, delta: OutputDelta) -> int:
        by_token = delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str)
        hidden = by_token and not self._job.submissions[prompt].params.include_stop_str_in_output
        return len(delta.token_ids) - hidden

    def _prompt(self, prompt: int, delta: OutputDelta) -> list[Event]:
        """The prompt, once all its log probabilities are there."""
        if not self._job.tell_prompts or prompt in self._told:
            return []
        submission = self._job.submissions[prompt]
        known = self._prompt_logprobs.setdefault(prompt, [None])
        known.extend(delta.prompt_logprobs if delta.index == 0 else ())
        wanted = submission.params.prompt_logprobs is not None
        if wanted and len(known) < len(submission.prompt_token_ids):
            return []
        self._told.add(prompt)
        return [Prompt(prompt, submission.prompt_token_ids, tuple(known) if wanted else ())]

    def _output(self, choice: int, delta: OutputDelta) -> list[Event]:
        if not self._job.parsers:
            return [Text(choice, delta.text)] if delta.text else []
        parser = self._job.parsers[choice]
        found = parser.feed(delta.text, delta.token_ids)
        if delta.finish_reason is not None:
            found = [*found, *parser.finish()]
        events = [self._parsed(choice, event) for event in found]
        # Counted by where a token's text went; of one that held text of both kinds, by the last.
        if self._reasoning[choice]:
            self._reasoning_tokens += len(delta.token_ids)
        return events

    def _parsed(self, choice: int, event: ParserEvent) -> Event:
        self._reasoning[choice] = isinstance(event, ReasoningDelta)
        if isinstance(event, TextDelta):
            return Text(choice, event.text)
        if isinstance(event, ReasoningDelta):
            return Reasoning(choice, event.text)
        if isinstance(event, ToolCallStart):
            self._calls[choice] += 1
            return ToolStart(choice, event.index, f"call_{uuid.uuid4().hex[:24]}", event.name)
        return ToolArguments(choice, event.index, event.text)
