"""What a step does on the device: eagerly, or as the replay of a captured graph of the step's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire.contract.attention import AttentionBackend, GraphSupport, KVCaches
from quire.contract.device import Ending, GraphKey, GraphRunner
from quire.contract.model import CausalLM, StepContext
from quire.contract.request import ScheduledRow
from quire.contract.sampling import SamplingBatch
from quire.engine.batch import BatchBuilder, StepInputs
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.preparing import StepSizes
from quire.engine.rows import RowTable
from quire.sampling.pipeline import greedy_columns


@dataclass(frozen=True, slots=True)
class ForwardParts:
    """What computes a step.

    Attributes:
        choose: (logits [R, V], parameters) -> tokens int32 [R], -1 in a row that is not finite; None if steps end at
            hidden states.
    """

    model: CausalLM
    backend: AttentionBackend
    graphs: GraphRunner
    choose: Callable[[Tensor, SamplingBatch], Tensor] | None


class ForwardPass:
    """Runs the model over a step's inputs; decode steps go on to their tokens, if they may.

    Args:
        parts: the model and where it runs. support: component -> the graphs that it can run in.
        builder: of the inputs, which it reads the tokens for. table: where sampled tokens are stored.

    Attributes:
        kv: the caches to use, indexed by layer id.
        dispatcher: chooses the size that a step is padded to.
        captures_later: the device captures a size when it first comes.
    """

    def __init__(
        self,
        parts: ForwardParts,
        support: Mapping[str, GraphSupport],
        sizes: StepSizes,
        builder: BatchBuilder,
        table: RowTable,
    ) -> None:
        self._parts, self._builder, self._table = parts, builder, table
        graphs = parts.graphs
        self.dispatcher = GraphDispatcher(graphs.keys(), support, sizes.max_num_seqs, sizes.max_num_batched_tokens)
        self.captures_later = graphs.lazy
        decodes = (key for key in self.dispatcher.keys if key.uniform_query_len == 1)
        self._endings = {key: _with_endings(key) if parts.choose else {} for key in decodes}
        self._greedy: dict[int, SamplingBatch] = {}
        self.kv: tuple[KVCaches, ...] = ()

    def pick(self, rows: Sequence[ScheduledRow], ending: Ending) -> GraphKey | None:
        """The size that a step of these rows is padded to; None: it runs eagerly, as it is.

        Args:
            ending: how far its work may go.
        """
        lengths = [row.num_new_tokens for row in rows]
        uniform = lengths[0] if min(lengths) == max(lengths) else 0
        key = self.dispatcher.pick(uniform, len(rows), sum(lengths))
        return None if key is None else self._endings.get(key, {}).get(ending, key)

    def capture(self, key: GraphKey, padding: StepInputs) -> None:
        """Have the device capture the steps of this size. Raises whatever it fails with."""
        plan = self._parts.backend.plan(padding.attention)
        self._parts.graphs.capture(key, self._work(padding, plan))
        for longer in self._endings.get(key, {}).values():
            self._parts.graphs.capture(longer, self._work_to_tokens(padding, plan, self._all_greedy(key.num_reqs)))

    def run(self, inputs: StepInputs, key: GraphKey | None, *, needs_all: bool) -> Tensor:
        """Hidden states [T, H] of the step's tokens, padding included.

        Unless it `needs_all`, they may be those of `inputs.sample_rows` alone; where no row samples, of any token.
        """
        wanted = None if needs_all or key is not None else _sampled(inputs)
        plan = self._parts.backend.plan(inputs.attention)
        hidden: Tensor = self._parts.graphs.run(key, self._work(inputs, plan, wanted))
        return hidden

    def run_to_tokens(self, inputs: StepInputs, key: GraphKey, batch: SamplingBatch | None) -> Tensor:
        """int32 [num_reqs], the rows' tokens, which are stored for the next step; -1 where logits are not finite.

        Args:
            batch: the rows' parameters; None: all are greedy.
        """
        plan = self._parts.backend.plan(inputs.attention)
        tokens: Tensor | None = self._parts.graphs.replay(key)
        if tokens is not None:
            return tokens
        with torch.inference_mode():
            work = self._work_to_tokens(inputs, plan, batch or self._all_greedy(key.num_reqs))
            found: Tensor = self._parts.graphs.run(key, work)
            return found

    def run_eagerly(self, inputs: StepInputs) -> Tensor:
        """As `run`, whatever graphs there are."""
        return self._work(inputs, self._parts.backend.plan(inputs.attention))()

    def _work(self, inputs: StepInputs, plan: Any, wanted: Tensor | None = None) -> Callable[[], Tensor]:
        """What a graph captures of a step. Planning stands before it: it may look at the host's lengths."""
        ctx = StepContext(self._parts.backend, inputs.attention, plan, self.kv, wanted)

        def work() -> Tensor:
            self._builder.read(inputs)
            return self._parts.model.forward(inputs.input_ids, inputs.positions, ctx)

        return work

    def _work_to_tokens(self, inputs: StepInputs, plan: Any, batch: SamplingBatch) -> Callable[[], Tensor]:
        forward, choose = self._work(inputs, plan), self._parts.choose
        assert choose is not None

        def work() -> Tensor:
            tokens = choose(self._parts.model.logits(forward()), batch)
            self._table.store(inputs.places, tokens.clamp(min=0))  # the next step reads one, whatever is wrong
            return tokens

        return work

    def _all_greedy(self, num_reqs: int) -> SamplingBatch:
        """Parameters of so many greedy rows."""
        known = self._greedy.get(num_reqs)
        if known is None:
            columns = greedy_columns(num_reqs)
            device = self._table.token_ids.device
            known = self._greedy[num_reqs] = columns.batch(lambda array: torch.from_numpy(array).to(device))
        return known


def _with_endings(key: GraphKey) -> dict[Ending, GraphKey]:
    return {"greedy": replace(key, ending="greedy"), "drawn": replace(key, ending="drawn")}


def _sampled(inputs: StepInputs) -> Tensor | None:
    """The tokens that rows sample from, at least one; None: all."""
    rows = inputs.sample_rows
    if len(rows) == len(inputs.input_ids):
        return None
    return rows if len(rows) else rows.new_zeros(1)
