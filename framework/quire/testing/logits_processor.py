"""Conformance of logits processors: rows and slots are apart, and a preempted request goes on as before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quire.contract.sampling import LogitsProcessor, ProcessorContext, ProcessorRequest, SamplerInit
from quire.params import SamplingParams

VOCAB_SIZE = 32
NUM_SLOTS = 8
MAX_MODEL_LEN = 24
STOP_TOKEN_ID = 3


class LogitsProcessorConformance:
    """What every processor must hold. Subclass, and give `processor_class` and `active_params`.

    The vocabulary has 32 tokens, token 3 ends an output; sequences have 4 prompt tokens and up to 8 more.
    """

    active_params: Sequence[SamplingParams] = ()
    """Parameters that the processor acts upon, as different as possible."""
    inactive_params: Sequence[SamplingParams] = (SamplingParams(),)
    """Parameters that it has nothing to do for; empty for a processor that acts upon every request."""
    options: object = None
    """The instance of `Provider.options` to construct it with, or None."""

    @pytest.fixture
    def processor_class(self) -> type[LogitsProcessor]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `processor_class`")

    def make(self, processor_class: type[LogitsProcessor]) -> LogitsProcessor:
        return processor_class(SamplerInit(torch.device("cpu"), VOCAB_SIZE, NUM_SLOTS, self.options))

    def test_there_is_something_to_test(self, processor_class: type[LogitsProcessor]) -> None:
        """`active_params` is given and accepted; each changes some logits of some step.

        If it fails: give parameters in `conformance` that the processor acts upon, and let `validate` accept them.
        """
        assert self.active_params, "give `active_params`"
        for params in self.active_params:
            processor_class.validate(params, VOCAB_SIZE)
            steps = self._generate(processor_class, params, slot=0, salt=0)
            assert any(not torch.equal(after, _logits(known, 0)) for known, after in steps), f"nothing done: {params!r}"

    def test_add_says_whether_there_is_work(self, processor_class: type[LogitsProcessor]) -> None:
        """`add` returns True for active parameters and False for inactive ones.

        If it fails: return False where the parameters ask for nothing: such rows never reach `apply`.
        """
        processor = self.make(processor_class)
        for params in self.active_params:
            assert processor.add(0, _request(params, _tokens(0), 4)) is True
            processor.remove(0)
        for params in self.inactive_params:
            processor_class.validate(params, VOCAB_SIZE)
            assert processor.add(1, _request(params, _tokens(0), 4)) is False

    def test_edits_in_place_and_leaves_the_rest_alone(self, processor_class: type[LogitsProcessor]) -> None:
        """`apply` returns None, writes no token buffer, and turns no finite logit into NaN or plus infinity.

        If it fails: write into `logits`, never bind it anew; forbid a token with minus infinity and leave one that is
        allowed.
        """
        for params in self.active_params:
            processor, buffer = self.make(processor_class), _buffer([_tokens(0)])
            processor.add(0, _request(params, _tokens(0)[:4], 4))
            logits, before = _logits(6, 0), buffer.clone()
            answer: object = processor.apply(logits, _context(processor_class, [(0, _tokens(0)[:6], params)], buffer))
            assert answer is None
            assert torch.equal(buffer, before), "the token buffer is read only"
            assert not (logits.isnan() | (logits == float("inf"))).any()

    def test_rows_do_not_depend_on_each_other(self, processor_class: type[LogitsProcessor]) -> None:
        """Together, in any order and at any slot, each row gets the bits that it gets alone.

        If it fails: row i belongs to slot `ctx.slots[i]`; look state up by slot, never by the row's place.
        """
        params = [self.active_params[index % len(self.active_params)] for index in range(5)]
        alone = [dict(self._generate(processor_class, each, slot=0, salt=salt)) for salt, each in enumerate(params)]
        slots = [6, 1, 4, 0, 7]
        processor, buffer = self.make(processor_class), torch.zeros(NUM_SLOTS, MAX_MODEL_LEN, dtype=torch.int32)
        for salt, each in enumerate(params):
            buffer[slots[salt], :12] = torch.tensor(_tokens(salt), dtype=torch.int32)
            processor.add(slots[salt], _request(each, _tokens(salt)[:4], 4))
        for known in range(4, 13):
            # Another order in each step; every third row stays out of it now and then.
            rows = [(index + known) % 5 for index in range(5) if known % 3 or index % 3]
            logits = torch.cat([_logits(known, salt) for salt in rows])
            chosen = [(slots[salt], _tokens(salt)[:known], params[salt]) for salt in rows]
            processor.apply(logits, _context(processor_class, chosen, buffer))
            for place, salt in enumerate(rows):
                assert torch.equal(logits[place : place + 1], alone[salt][known]), f"row {place} with {known} tokens"

    def test_a_slot_forgets_its_request(self, processor_class: type[LogitsProcessor]) -> None:
        """After `remove`, the next request of the slot is treated as by a fresh processor.

        If it fails: delete the slot's state in `remove`, or make it anew in `add`.
        """
        for first in self.active_params:
            for second in self.active_params:
                processor = self.make(processor_class)
                self._generate(processor_class, first, slot=2, salt=0, processor=processor)
                processor.remove(2)
                reused = self._generate(processor_class, second, slot=2, salt=1, processor=processor)
                _assert_same(reused, self._generate(processor_class, second, slot=2, salt=1))

    def test_preemption_changes_nothing(self, processor_class: type[LogitsProcessor]) -> None:
        """A request that leaves and returns, with all its tokens and at another slot, goes on as if it had stayed.

        If it fails: derive all state from `request.token_ids` in `add` and from `ctx` in `apply`; count no calls.
        """
        for params in self.active_params:
            whole = self._generate(processor_class, params, slot=0, salt=0)
            for cut in (5, 9):
                processor = self.make(processor_class)
                early = self._generate(processor_class, params, slot=0, salt=0, end=cut, processor=processor)
                processor.remove(0)
                late = self._generate(processor_class, params, slot=3, salt=0, start=cut, processor=processor)
                _assert_same([*early[:-1], *late], whole)

    def test_stale_tokens_are_not_read(self, processor_class: type[LogitsProcessor]) -> None:
        """What the buffer holds behind a row's known tokens is an older request's, and means nothing.

        If it fails: read `ctx.token_ids[slot, : num_tokens]` only.
        """
        for params in self.active_params:
            clean = self._generate(processor_class, params, slot=0, salt=0, stale=30)
            _assert_same(self._generate(processor_class, params, slot=0, salt=0, stale=31), clean)

    def test_the_claim_on_argmax_holds(self, processor_class: type[LogitsProcessor]) -> None:
        """A processor that says `argmax_invariant` never changes the most likely token.

        If it fails: take the claim back: a processor that makes it is skipped for greedy rows.
        """
        if not processor_class.argmax_invariant:
            return
        for params in self.active_params:
            for salt in range(20):
                for known, after in self._generate(processor_class, params, slot=0, salt=salt):
                    assert int(after.argmax()) == int(_logits(known, salt).argmax())

    def _generate(
        self,
        processor_class: type[LogitsProcessor],
        params: SamplingParams,
        *,
        slot: int,
        salt: int,
        start: int = 4,
        end: int = 12,
        stale: int = 0,
        processor: LogitsProcessor | None = None,
    ) -> list[tuple[int, Tensor]]:
        """(known tokens, logits [1, V] after the processor) of one request, step by step."""
        processor = processor or self.make(processor_class)
        tokens = _tokens(salt)
        processor.add(slot, _request(params, tokens[:start], 4))
        steps = []
        for known in range(start, end + 1):
            buffer = torch.full((NUM_SLOTS, MAX_MODEL_LEN), stale, dtype=torch.int32)
            buffer[slot, :known] = torch.tensor(tokens[:known], dtype=torch.int32)
            logits = _logits(known, salt)
            processor.apply(logits, _context(processor_class, [(slot, tokens[:known], params)], buffer))
            steps.append((known, logits))
        return steps


def _context(
    processor_class: type[LogitsProcessor], rows: Sequence[tuple[int, Sequence[int], SamplingParams]], buffer: Tensor
) -> ProcessorContext:
    """The context of rows (slot, known tokens, parameters); the host's tokens only for those that need them."""
    needed = [processor_class.needs_host_tokens(params) for _, _, params in rows]
    known = [tokens if need else () for need, (_, tokens, _) in zip(needed, rows, strict=True)]
    host = known if any(needed) else ()
    return ProcessorContext([slot for slot, _, _ in rows], [len(tokens) for _, tokens, _ in rows], buffer, host)


def _request(params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> ProcessorRequest:
    return ProcessorRequest("request", params, tuple(token_ids), num_prompt_tokens, frozenset({STOP_TOKEN_ID}))


def _tokens(salt: int) -> list[int]:
    """Twelve tokens, some of them twice."""
    return torch.randint(0, 8, (12,), generator=torch.Generator().manual_seed(salt)).tolist()


def _logits(known: int, salt: int) -> Tensor:
    """float32 [1, V] of a step."""
    return torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(100 * salt + known)) * 2


def _buffer(rows: Sequence[Sequence[int]]) -> Tensor:
    buffer = torch.zeros(NUM_SLOTS, MAX_MODEL_LEN, dtype=torch.int32)
    for slot, tokens in enumerate(rows):
        buffer[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return buffer


def _assert_same(ours: Sequence[tuple[int, Tensor]], theirs: Sequence[tuple[int, Tensor]]) -> None:
    assert [known for known, _ in ours] == [known for known, _ in theirs]
    for (known, left), (_, right) in zip(ours, theirs, strict=True):
        assert torch.equal(left, right), f"differs with {known} known tokens"
