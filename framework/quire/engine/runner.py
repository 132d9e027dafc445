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
from quire.contract.device import Device, Ending, GraphKey
from quire.contract.kv import BlockCopy
from quire.contract.model import CausalLM
from quire.contract.request import NewRow, RowResult, Schedule, ScheduledRow, StepResult
from quire.contract.sampling import ProcessorRequest
from quire.engine.batch import StepInputs
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.forward import ForwardParts, ForwardPass
from quire.engine.isolate import isolate
from quire.engine.launched import Launched, Running, Times
from quire.engine.preparing import SampledRows, StepPreparer, StepSizes
from quire.engine.prompts import PromptFigures, any_prompt_figures, prompt_entries, prompt_figures
from quire.sampling.pipeline import SamplingPipeline, SamplingResult, chosen_result


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner works with. `graph_support`: component -> the graphs that it can run in."""

    model: CausalLM
    backend: AttentionBackend
    device: Device
    graph_support: Mapping[str, GraphSupport]
    pipeline: SamplingPipeline
    sizes: StepSizes
    blame: Callable[[BaseException], str]


class Runner:
    """Executes schedules, in order; at most one may be in flight while another is launched."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._preparer = StepPreparer(parts.device, parts.sizes, parts.pipeline)
        self._rows = self._preparer.table
        graphs = parts.device.graph_runner()
        # A graph's result is overwritten by the next step, which an asynchronous device begins before it is read.
        choose = parts.pipeline.choose if graphs.lazy and not parts.device.runs_async else None
        forward = ForwardParts(parts.model, parts.backend, graphs, choose)
        self._forward = ForwardPass(forward, parts.graph_support, parts.sizes, self._preparer.builder, self._rows)
        self._flying: list[Launched] = []

    @property
    def dispatcher(self) -> GraphDispatcher:
        """Chooses the size that a step is padded to."""
        return self._forward.dispatcher

    @property
    def captures_later(self) -> bool:
        """Whether the device captures a step's size when it first comes, and not before."""
        return self._forward.captures_later

    def attach(self, kv: tuple[KVCaches, ...]) -> None:
        """Use these caches from now on, indexed by layer id."""
        self._forward.kv = kv

    @torch.inference_mode()
    def capture(self, key: GraphKey) -> None:
        """Have the device capture the steps of this size. Raises whatever it fails with."""
        self._forward.capture(key, self._preparer.padding(key))

    @torch.inference_mode()
    def rehearse(self, key: GraphKey) -> None:
        """Run a step of padding, at its largest: every row is sampled, none greedily."""
        slots = list(range(key.num_reqs))
        hidden = self._forward.run_eagerly(self._preparer.padding(key))
        columns = self._parts.pipeline.columns(slots, [0] * len(slots))
        warm = replace(columns, temperature=np.ones(len(slots), dtype=np.float32))
        batch = warm.batch(lambda array: torch.from_numpy(array).to(hidden.device))
        logits = self._parts.model.logits(hidden[: len(slots)])
        self._parts.pipeline.run(logits, slots, [0] * len(slots), self._rows.token_ids, batch)

    # Inference mode is entered by those who need it: that takes as long as the staging of a decode step.
    def launch(self, schedule: Schedule) -> Launched:
        """Hand one schedule to the device. What fails for single rows is their result; what does for all is raised."""
        launched = Launched(schedule, Times(time.perf_counter()))
        self._rows.apply(schedule)
        if schedule.released or schedule.new_rows or schedule.copies:
            self._change_rows(schedule)
        self._start(launched)
        if launched.error is not None:
            raise launched.error
        self._flying.append(launched)
        if not self._parts.device.runs_async:
            self._settle(launched)  # all is there, and the next step will overwrite it
        return launched

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

    @torch.inference_mode()
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

    def _launch_rows(self, rows: Sequence[ScheduledRow], times: Times) -> Running:
        all_sample = all(row.samples for row in rows)
        ending: Ending = self._parts.pipeline.ending([row.slot for row in rows]) if all_sample else "hidden"
        key = self._forward.pick(rows, ending)
        inputs, sampling = self._preparer.prepare(rows, key)
        times.build += times.lap()
        if key is not None and key.ending != "hidden":
            tokens = self._forward.run_to_tokens(inputs, key, sampling.batch if sampling is not None else None)
            times.forward += times.lap()
            return self._running(rows, chosen_result(tokens, len(rows)), {}, times)
        return self._launch_others(rows, inputs, sampling, key, times)

    @torch.inference_mode()
    def _launch_others(
        self,
        rows: Sequence[ScheduledRow],
        inputs: StepInputs,
        sampling: SampledRows | None,
        key: GraphKey | None,
        times: Times,
    ) -> Running:
        tells_prompts = any_prompt_figures(rows, self._rows)
        hidden = self._forward.run(inputs, key, needs_all=tells_prompts)
        times.forward += times.lap()
        sampled = None if sampling is None else self._sample(sampling, hidden, inputs)
        prompts = prompt_figures(rows, hidden, self._rows, self._parts.model.logits) if tells_prompts else {}
        return self._running(rows, sampled, prompts, times)

    def _running(
        self,
        rows: Sequence[ScheduledRow],
        sampled: SamplingResult | None,
        prompts: dict[str, PromptFigures],
        times: Times,
    ) -> Running:
        """The rows, with a copy of their results to the host that has been started."""
        tensors = [prompt.figures for prompt in prompts.values()]
        if sampled is not None:
            tensors += sampled.tensors()
        # Also if there is nothing to bring: the step's buffer is free for another one when the copy was waited for.
        copy = self._parts.device.copy_to_host(tensors)
        times.sample += times.lap()
        return Running(rows, sampled, prompts, copy)

    @torch.inference_mode()
    def _change_rows(self, schedule: Schedule) -> None:
        for slot in schedule.released:
            self._parts.pipeline.remove(slot)
        for new in schedule.new_rows:
            self._parts.pipeline.add(new.slot, _processor_request(new, new.token_ids), new.seed)
        if schedule.copies:
            self._copy_blocks(schedule.copies)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """In order: a block may be the destination of one copy and the source of a later one."""
        for caches in self._forward.kv:
            for cache in caches:
                for copy in copies:
                    cache[copy.dst].copy_(cache[copy.src])

    def _sample(self, sampling: SampledRows, hidden: Tensor, inputs: StepInputs) -> SamplingResult:
        parts = self._parts
        # Each token samples, as in most decode steps, or the model has left out those that do not.
        no_others = len(sampling.slots) == len(hidden)
        logits = parts.model.logits(hidden if no_others else hidden.index_select(0, inputs.sample_rows))
        result = parts.pipeline.run(logits, sampling.slots, sampling.lengths, self._rows.token_ids, sampling.batch)
        self._rows.store(inputs.places, result.token_ids)
        return result

    def _collect_rows(self, running: Running, times: Times) -> tuple[RowResult, ...]:
        """One result per row, from what the copy has brought."""
        tensors = running.copy.wait()
        prompts = prompt_entries(running.prompts, tensors)
        sampled = None if running.sampled is None else running.sampled.read(tensors[len(running.prompts) :])
        answers = sampled.rows() if sampled is not None else iter(())
        results = []
        for row in running.rows:
            prompt = prompts.get(row.request_id, ())
            token, entry, error = next(answers) if row.samples else (None, None, None)
            results.append(RowResult(row.request_id, token, entry, prompt, error))
        if sampled is not None:  # once nothing can fail any more
            self._parts.pipeline.told([row.slot for row in running.rows if row.samples], sampled.token_ids)
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
