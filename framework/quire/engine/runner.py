"""Runs one step on the device: inputs, forward, logits of the rows that need one, sampling.

`collect` is the one place where the host waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, KVCaches
from quire.contract.device import Device, GraphKey
from quire.contract.kv import BlockCopy
from quire.contract.model import CausalLM, StepContext
from quire.contract.request import NewRow, RowResult, Schedule, ScheduledRow, StepResult, TokenLogprobs
from quire.contract.sampling import ProcessorRequest
from quire.engine.batch import BatchBuilder, StepInputs
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.isolate import isolate
from quire.engine.rows import RowTable
from quire.sampling.pipeline import SamplingPipeline, SamplingResult, prompt_logprobs

PROMPT_LOGPROB_ROWS = 128
"""Rows whose full-vocabulary logits are held at once while prompt log probabilities are taken."""


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner works with."""

    model: CausalLM
    backend: AttentionBackend
    device: Device
    kv: tuple[KVCaches, ...]
    pipeline: SamplingPipeline
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    blame: Callable[[BaseException], str]


@dataclass(slots=True)
class _Times:
    """Where a step's seconds went; `since`: when the present part began."""

    since: float
    build: float = 0.0
    forward: float = 0.0
    sample: float = 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        took, self.since = now - self.since, now
        return took


class Runner:
    """Executes schedules, one at a time."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        device = parts.device.torch_device()
        self._rows = RowTable(parts.max_num_seqs, parts.max_model_len, parts.block_size, device)
        self._builder = BatchBuilder(self._rows, parts.device, parts.max_num_batched_tokens, parts.block_size)
        self._graphs = parts.device.graph_runner()
        self._dispatcher = GraphDispatcher(self._graphs.keys(), {"attention": parts.backend.caps.graph})

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> StepResult:
        """Execute one schedule. What goes wrong for single rows is their result; what does for all is raised."""
        started = time.perf_counter()
        self._apply(schedule)
        if schedule.is_empty:
            return StepResult(schedule.step_id)
        times = _Times(started)
        try:
            rows = self._run_rows(schedule.rows, times)
        except Exception as error:
            if len(schedule.rows) == 1:
                raise
            rows = isolate(schedule.rows, error, lambda part: self._run_rows(part, times), self._parts.blame)
        return StepResult(schedule.step_id, rows, build_s=times.build, forward_s=times.forward, sample_s=times.sample)

    def _run_rows(self, rows: Sequence[ScheduledRow], times: _Times) -> tuple[RowResult, ...]:
        key = self._pick(rows)
        inputs = self._builder.build(rows, key)
        times.build += times.lap()
        hidden = self._forward(inputs, key)
        times.forward += times.lap()
        sampled = self._sample(rows, hidden, inputs)
        prompts = self._prompt_logprobs(rows, hidden, inputs)
        results = self.collect(rows, sampled, prompts)
        times.sample += times.lap()
        return results

    def _apply(self, schedule: Schedule) -> None:
        for slot in schedule.released:
            self._parts.pipeline.remove(slot)
        self._rows.apply(schedule)
        for new in schedule.new_rows:
            self._parts.pipeline.add(new.slot, _processor_request(new), new.seed)
        if schedule.copies:
            self._copy_blocks(schedule.copies)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """In order: a block may be the destination of one copy and the source of a later one."""
        for caches in self._parts.kv:
            for cache in caches:
                for copy in copies:
                    cache[copy.dst].copy_(cache[copy.src])

    def _pick(self, rows: Sequence[ScheduledRow]) -> GraphKey | None:
        lengths = [row.num_new_tokens for row in rows]
        uniform = lengths[0] if min(lengths) == max(lengths) else 0
        return self._dispatcher.pick(uniform, len(rows), sum(lengths))

    def _forward(self, inputs: StepInputs, key: GraphKey | None) -> Tensor:
        parts = self._parts
        plan = parts.backend.plan(inputs.attention)
        ctx = StepContext(parts.backend, inputs.attention, plan, parts.kv)
        hidden: Tensor = self._graphs.run(key, lambda: parts.model.forward(inputs.input_ids, inputs.positions, ctx))
        return hidden

    def _sample(self, rows: Sequence[ScheduledRow], hidden: Tensor, inputs: StepInputs) -> SamplingResult | None:
        sampling = [row for row in rows if row.samples]
        if not sampling:
            return None
        parts = self._parts
        logits = parts.model.logits(hidden[inputs.sample_rows])
        slots = [row.slot for row in sampling]
        lengths = [row.num_computed_tokens + row.num_new_tokens for row in sampling]
        result = parts.pipeline.run(logits, slots, lengths, self._rows.token_ids)
        device = result.token_ids.device
        self._rows.store(torch.tensor(slots, device=device), torch.tensor(lengths, device=device), result.token_ids)
        return result

    def _prompt_logprobs(
        self, rows: Sequence[ScheduledRow], hidden: Tensor, inputs: StepInputs
    ) -> dict[str, tuple[TokenLogprobs, ...]]:
        found: dict[str, tuple[TokenLogprobs, ...]] = {}
        start = 0
        for row in rows:
            known = self._rows.rows[row.slot]
            wanted = known.params.prompt_logprobs
            first = row.num_computed_tokens
            count = min(row.num_new_tokens, known.num_prompt_tokens - 1 - first)
            if wanted is not None and count > 0:
                targets = self._rows.token_ids[row.slot, first + 1 : first + 1 + count].long()
                found[row.request_id] = self._token_logprobs(hidden[start : start + count], targets, wanted)
            start += row.num_new_tokens
        return found

    def _token_logprobs(self, hidden: Tensor, targets: Tensor, count: int) -> tuple[TokenLogprobs, ...]:
        pieces = zip(torch.split(hidden, PROMPT_LOGPROB_ROWS), torch.split(targets, PROMPT_LOGPROB_ROWS), strict=True)
        return tuple(
            entry
            for piece, target in pieces
            for entry in prompt_logprobs(self._parts.model.logits(piece), target, count)
        )

    def collect(
        self,
        rows: Sequence[ScheduledRow],
        sampled: SamplingResult | None,
        prompts: dict[str, tuple[TokenLogprobs, ...]],
    ) -> tuple[RowResult, ...]:
        """Bring the sampled tokens to the host, one result per row."""
        if sampled is None:
            return tuple(RowResult(row.request_id, prompt_logprobs=prompts.get(row.request_id, ())) for row in rows)
        tokens = iter(sampled.token_ids.tolist())  # sync-ok: the step's one wait, its tokens are needed now
        logprobs, errors = iter(sampled.logprobs), iter(sampled.errors)
        results = []
        for row in rows:
            prompt = prompts.get(row.request_id, ())
            if row.samples:
                token, entry, error = next(tokens), next(logprobs), next(errors)
                results.append(RowResult(row.request_id, token, entry, prompt, error))
            else:
                results.append(RowResult(row.request_id, prompt_logprobs=prompt))
        return tuple(results)


def _processor_request(new: NewRow) -> ProcessorRequest:
    return ProcessorRequest(
        request_id=new.request_id,
        params=new.params,
        token_ids=new.token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        stop_token_ids=new.stop_token_ids,
    )
