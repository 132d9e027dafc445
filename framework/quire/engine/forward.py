"""The model's forward pass: eagerly, or as the replay of a captured graph of the step's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from quire.contract.attention import AttentionBackend, GraphSupport, KVCaches
from quire.contract.device import GraphKey, GraphRunner
from quire.contract.model import CausalLM, StepContext
from quire.contract.request import ScheduledRow
from quire.engine.batch import StepInputs
from quire.engine.dispatcher import GraphDispatcher
from quire.engine.preparing import StepSizes


class ForwardPass:
    """Runs the model over a step's inputs.

    Args:
        graphs: the device's. support: component -> the graphs that it can run in.

    Attributes:
        kv: the caches to use, indexed by layer id.
        dispatcher: chooses the size that a step is padded to.
        captures_later: the device captures a size when it first comes.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        graphs: GraphRunner,
        support: Mapping[str, GraphSupport],
        sizes: StepSizes,
    ) -> None:
        self._model, self._backend, self._graphs = model, backend, graphs
        self.dispatcher = GraphDispatcher(graphs.keys(), support, sizes.max_num_seqs, sizes.max_num_batched_tokens)
        self.captures_later = graphs.lazy
        self.kv: tuple[KVCaches, ...] = ()

    def pick(self, rows: Sequence[ScheduledRow]) -> GraphKey | None:
        """The size that a step of these rows is padded to; None: it runs eagerly, as it is."""
        lengths = [row.num_new_tokens for row in rows]
        uniform = lengths[0] if min(lengths) == max(lengths) else 0
        return self.dispatcher.pick(uniform, len(rows), sum(lengths))

    def capture(self, key: GraphKey, padding: StepInputs) -> None:
        """Have the device capture the steps of this size. Raises whatever it fails with."""
        self._graphs.capture(key, self._work(padding))

    def run(self, inputs: StepInputs, key: GraphKey | None, *, needs_all: bool) -> Tensor:
        """Hidden states [T, H] of the step's tokens, padding included.

        Unless it `needs_all`, they may be those of `inputs.sample_rows` alone; where no row samples, of any token.
        """
        wanted = None if needs_all or key is not None else _sampled(inputs)
        hidden: Tensor = self._graphs.run(key, self._work(inputs, wanted))
        return hidden

    def run_eagerly(self, inputs: StepInputs) -> Tensor:
        """As `run`, whatever graphs there are."""
        return self._work(inputs)()

    def _work(self, inputs: StepInputs, wanted: Tensor | None = None) -> Callable[[], Tensor]:
        """What a graph captures of a step. Planning stands before it: it may look at the host's lengths."""
        plan = self._backend.plan(inputs.attention)
        ctx = StepContext(self._backend, inputs.attention, plan, self.kv, wanted)
        return lambda: self._model.forward(inputs.input_ids, inputs.positions, ctx)


def _sampled(inputs: StepInputs) -> Tensor | None:
    """The tokens that rows sample from, at least one; None: all."""
    rows = inputs.sample_rows
    if len(rows) == len(inputs.input_ids):
        return None
    return rows if len(rows) else rows.new_zeros(1)
