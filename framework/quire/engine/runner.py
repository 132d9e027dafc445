"""Runs steps on the device: inputs, forward, logits of the rows that need one, sampling.

`launch` hands a step to the device and waits for nothing; `collect` is the one place where the host
waits. One step may be launched while the one before it has not been collected: what it samples goes
from step to step through the device's own table of tokens (`RowTable`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, GraphSupport, KVCaches
from quire.contract.device import Device, GraphKey, HostCopy
from quire.contract.kv import BlockCopy
from quire.contract.model import CausalLM, StepContext
from quire.contract.request import NewRow, RowResult, Schedule, ScheduledRow, StepResult, TokenLogprobs
from quire.contract.sampling import ProcessorRequest, SamplingBatch
from quire.engine.batch import BatchBuilder, StepInputs
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.isolate import isolate
from quire.engine.rows import RowTable
from quire.engine.staging import ALIGNMENT, Staging
from quire.sampling.logprobs import logprob_entries, logprob_figures
from quire.sampling.pipeline import SamplingColumns, SamplingPipeline, SamplingResult

PROMPT_LOGPROB_ROWS = 128
"""Rows whose full-vocabulary logits are held at once while prompt log probabilities are taken."""
DELTA_BYTES = 1 << 20
"""Room in a step's buffer for what changes: new blocks, tokens of new requests."""


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner works with. `graph_support`: component -> the graphs that it can run in."""

    model: CausalLM
    backend: AttentionBackend
    device: Device
    graph_support: Mapping[str, GraphSupport]
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


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Figures of a row's prompt log probabilities, on the device: `num_entries` with `count` alternatives each."""

    figures: Tensor
    num_entries: int
    count: int


@dataclass(frozen=True, slots=True)
class _Running:
    """Rows that the device is working on, and the copy that brings their results."""

    rows: Sequence[ScheduledRow]
    sampled: SamplingResult | None
    prompts: dict[str, _Prompt]
    copy: HostCopy


@dataclass(slots=True, eq=False)
class Launched:
    """A step that was launched: its rows on the device, or what came of them once the host has waited.

    `waited`: seconds that it waited for. `error`: what the step failed with, if all of its rows did.
    """

    schedule: Schedule
    times: _Times
    running: _Running | None = None
    results: tuple[RowResult, ...] = ()
    waited: float = 0.0
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Sampling:
    """The rows of a step that sample: slots, known tokens, and on the device their parameters.

    `places`: int64 [S], where their tokens go in the flattened table of tokens.
    """

    slots: list[int]
    lengths: list[int]
    batch: SamplingBatch
    places: Tensor


class Runner:
    """Executes schedules, in order; at most one may be in flight while another is launched."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._graphs = parts.device.graph_runner()
        keys = self._graphs.keys()
        device = parts.device.torch_device()
        room = BatchBuilder.num_bytes(parts.max_num_seqs, parts.max_num_batched_tokens)
        room += (SamplingColumns.NUM_BYTES + 8) * parts.max_num_seqs + 8 * ALIGNMENT
        room += DELTA_BYTES + 4 * parts.max_model_len
        self._staging = Staging(parts.device, room, shared=device.type == "cpu" and not keys)
        self._rows = RowTable(parts.max_num_seqs, parts.max_model_len, parts.block_size, device)
        self._builder = BatchBuilder(self._rows, self._staging, parts.max_num_batched_tokens, parts.block_size)
        self._dispatcher = GraphDispatcher(keys, parts.graph_support, parts.max_num_seqs, parts.max_num_batched_tokens)
        self._kv: tuple[KVCaches, ...] = ()
        self._flying: list[Launched] = []

    @property
    def dispatcher(self) -> GraphDispatcher:
        """Chooses the size that a step is padded to."""
        return self._dispatcher

    def attach(self, kv: tuple[KVCaches, ...]) -> None:
        """Use these caches from now on, indexed by layer id."""
        self._kv = kv

    @torch.inference_mode()
    def capture(self, key: GraphKey) -> None:
        """Have the device capture the steps of this size. Raises whatever it fails with."""
        self._graphs.capture(key, self._forward_work(self._padding(key)))

    @torch.inference_mode()
    def rehearse(self, key: GraphKey) -> None:
        """Run a step of padding, at its largest: every row is sampled, none greedily."""
        slots = list(range(key.num_reqs))
        hidden = self._forward_work(self._padding(key))()
        columns = self._parts.pipeline.columns(slots, [0] * len(slots))
        warm = replace(columns, temperature=np.ones(len(slots), dtype=np.float32))
        batch = warm.batch(lambda array: torch.from_numpy(array).to(hidden.device))
        logits = self._parts.model.logits(hidden[: len(slots)])
        self._parts.pipeline.run(logits, slots, [0] * len(slots), self._rows.token_ids, batch)

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> Launched:
        """Hand one schedule to the device. What fails for single rows is their result; what does for all is raised."""
        launched = Launched(schedule, _Times(time.perf_counter()))
        self._apply(schedule)
        self._start(launched)
        if launched.error is not None:
            raise launched.error
        self._flying.append(launched)
        return launched

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """Wait for a launched step, and bring its results to the host. Fails as `launch` does."""
        self._settle(launched)
        self._flying.remove(launched)
        if launched.error is not None:
            raise launched.error
        times = launched.times
        step_id = launched.schedule.step_id
        return StepResult(step_id, launched.results, times.build, times.forward, times.sample, launched.waited)

    def _start(self, launched: Launched) -> None:
        """Launch the step's rows; if that fails, wait for all that runs, and find out who is to blame."""
        if launched.schedule.is_empty:
            return
        try:
            launched.running = self._launch_rows(launched.schedule.rows, launched.times)
        except Exception as error:
            for earlier in self._flying:
                self._settle(earlier)
            self._take_apart(launched, error)

    def _settle(self, launched: Launched) -> None:
        """Have the step's results here. A failure that only shows now is looked into as one at the launch is."""
        running, launched.running = launched.running, None
        if running is None:
            return
        began = time.perf_counter()
        try:
            running.copy.wait()
            launched.times.since = time.perf_counter()
            launched.waited = launched.times.since - began
            launched.results = self._collect_rows(running, launched.times)
        except Exception as error:
            later = self._flying[self._flying.index(launched) + 1 :]
            # Processors have seen tokens that the failed step did not really sample.
            anew = {row.slot: row for step in (*later[::-1], launched) for row in step.schedule.rows if row.samples}
            self._take_apart(launched, error, anew.values())
            for step in later if launched.error is None else ():
                step.running, step.results, step.error = None, (), None
                self._start(step)

    def _take_apart(self, launched: Launched, error: Exception, anew: Iterable[ScheduledRow] = ()) -> None:
        """Run the rows of a failed step in parts. `anew`: rows whose processors must start from their tokens again."""
        rows, times = launched.schedule.rows, launched.times
        launched.error = error
        if len(rows) == 1:
            return
        try:
            self._parts.device.synchronize()  # the buffers that take turns are all free then
            for row in anew:
                self._begin_anew(row)
            launched.results = isolate(
                rows,
                error,
                lambda part: self._collect_rows(self._launch_rows(part, times), times),
                self._parts.blame,
            )
            launched.error = None
        except Exception as failure:
            launched.error = failure

    def _begin_anew(self, row: ScheduledRow) -> None:
        new = self._rows.rows[row.slot].new
        tokens = self._rows.token_ids[row.slot, : row.num_computed_tokens + row.num_new_tokens]
        self._parts.pipeline.remove(row.slot)
        known = tokens.tolist()  # sync-ok: the step has failed, and nothing runs any more
        self._parts.pipeline.add(row.slot, _processor_request(new, known), new.seed)

    def _launch_rows(self, rows: Sequence[ScheduledRow], times: _Times) -> _Running:
        key = self._pick(rows)
        inputs, sampling = self._prepare(rows, key)
        times.build += times.lap()
        hidden = self._forward(inputs, key)
        times.forward += times.lap()
        sampled = self._sample(sampling, hidden, inputs)
        prompts = self._prompt_logprobs(rows, hidden)
        tensors = [prompt.figures for prompt in prompts.values()]
        if sampled is not None:
            tensors += sampled.tensors()
        # Also if there is nothing to bring: the step's buffer is free for another one when the copy was waited for.
        copy = self._parts.device.copy_to_host(tensors)
        times.sample += times.lap()
        return _Running(rows, sampled, prompts, copy)

    def _apply(self, schedule: Schedule) -> None:
        for slot in schedule.released:
            self._parts.pipeline.remove(slot)
        self._rows.apply(schedule)
        for new in schedule.new_rows:
            self._parts.pipeline.add(new.slot, _processor_request(new, new.token_ids), new.seed)
        if schedule.copies:
            self._copy_blocks(schedule.copies)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """In order: a block may be the destination of one copy and the source of a later one."""
        for caches in self._kv:
            for cache in caches:
                for copy in copies:
                    cache[copy.dst].copy_(cache[copy.src])

    def _pick(self, rows: Sequence[ScheduledRow]) -> GraphKey | None:
        lengths = [row.num_new_tokens for row in rows]
        uniform = lengths[0] if min(lengths) == max(lengths) else 0
        return self._dispatcher.pick(uniform, len(rows), sum(lengths))

    def _prepare(self, rows: Sequence[ScheduledRow], key: GraphKey | None) -> tuple[StepInputs, _Sampling]:
        """Everything that the step reads, brought to the device in one copy."""
        staging = self._staging
        staging.begin()
        batch = self._builder.stage(rows, key)
        sampling = self._stage_sampling(rows)
        deltas = self._rows.stage(staging)
        staging.send()
        self._rows.flush(deltas)
        return self._builder.inputs(batch), sampling

    def _stage_sampling(self, rows: Sequence[ScheduledRow]) -> _Sampling:
        sampling = [row for row in rows if row.samples]
        slots = [row.slot for row in sampling]
        lengths = [row.num_computed_tokens + row.num_new_tokens for row in sampling]
        columns, width = self._parts.pipeline.columns(slots, lengths), self._rows.token_ids.shape[1]
        places = np.array(slots, dtype=np.int64) * width + columns.positions
        return _Sampling(slots, lengths, columns.batch(self._staging.put), self._staging.put(places))

    def _forward(self, inputs: StepInputs, key: GraphKey | None) -> Tensor:
        hidden: Tensor = self._graphs.run(key, self._forward_work(inputs))
        return hidden

    def _forward_work(self, inputs: StepInputs) -> Callable[[], Tensor]:
        """What a graph captures of a step. Planning stands before it: it may look at the host's lengths."""
        parts = self._parts
        plan = parts.backend.plan(inputs.attention)
        ctx = StepContext(parts.backend, inputs.attention, plan, self._kv)
        return lambda: parts.model.forward(inputs.input_ids, inputs.positions, ctx)

    def _padding(self, key: GraphKey) -> StepInputs:
        self._staging.begin()
        staged = self._builder.stage((), key)
        self._staging.send()
        return self._builder.inputs(staged)

    def _sample(self, sampling: _Sampling, hidden: Tensor, inputs: StepInputs) -> SamplingResult | None:
        if not sampling.slots:
            return None
        parts = self._parts
        logits = parts.model.logits(hidden.index_select(0, inputs.sample_rows))
        result = parts.pipeline.run(logits, sampling.slots, sampling.lengths, self._rows.token_ids, sampling.batch)
        self._rows.store(sampling.places, result.token_ids)
        return result

    def _prompt_logprobs(self, rows: Sequence[ScheduledRow], hidden: Tensor) -> dict[str, _Prompt]:
        found: dict[str, _Prompt] = {}
        start = 0
        for row in rows:
            known = self._rows.rows[row.slot].new
            wanted = known.params.prompt_logprobs
            first = row.num_computed_tokens
            count = min(row.num_new_tokens, known.num_prompt_tokens - 1 - first)
            if wanted is not None and count > 0:
                targets = self._rows.token_ids[row.slot, first + 1 : first + 1 + count].long()
                figures = self._figures(hidden[start : start + count], targets, wanted)
                found[row.request_id] = _Prompt(figures, count, wanted)
            start += row.num_new_tokens
        return found

    def _figures(self, hidden: Tensor, targets: Tensor, count: int) -> Tensor:
        pieces = zip(torch.split(hidden, PROMPT_LOGPROB_ROWS), torch.split(targets, PROMPT_LOGPROB_ROWS), strict=True)
        return torch.cat(
            [
                logprob_figures(self._parts.model.logits(piece), target, [count] * len(target))
                for piece, target in pieces
            ]
        )

    def _collect_rows(self, running: _Running, times: _Times) -> tuple[RowResult, ...]:
        """One result per row, from what the copy has brought."""
        tensors = running.copy.wait()
        prompts: dict[str, tuple[TokenLogprobs, ...]] = {
            request_id: tuple(logprob_entries(figures, [prompt.count] * prompt.num_entries))
            for (request_id, prompt), figures in zip(running.prompts.items(), tensors, strict=False)
        }
        sampled = None if running.sampled is None else running.sampled.read(tensors[len(running.prompts) :])
        results, told, at = [], [], 0
        for row in running.rows:
            prompt = prompts.get(row.request_id, ())
            if sampled is None or not row.samples:
                results.append(RowResult(row.request_id, prompt_logprobs=prompt))
                continue
            token, entry, error = sampled.token_ids[at], sampled.logprobs[at], sampled.errors[at]
            told.append((row.slot, token))
            results.append(RowResult(row.request_id, token, entry, prompt, error))
            at += 1
        for slot, token in told:  # once nothing can fail any more
            self._parts.pipeline.told(slot, token)
        times.sample += times.lap()
        return tuple(results)


def _processor_request(new: NewRow, token_ids: Sequence[int]) -> ProcessorRequest:
    return ProcessorRequest(
        request_id=new.request_id,
        params=new.params,
        token_ids=token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        stop_token_ids=new.stop_token_ids,
    )
