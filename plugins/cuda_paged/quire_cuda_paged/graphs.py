"""CUDA graphs: a step's kernels are captured once per size, and launched together from then on.

All graphs share one pool of memory: they are captured from the largest to the smallest, never run at the
same time, and each holds on to its result alone. A capture records addresses, so whatever a step reads must
stand where it stood (`GraphRunner.run`); what `work` allocates comes from the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quire.plugin import GraphKey, GraphRunner

DECODE_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32))
"""Rows of the captured decode steps; the closer together, the less is padded, and the more is captured."""
MIXED_SIZES = (256, 512, 1024, 2048)
"""Tokens of the captured mixed steps. Larger ones keep the GPU busy for longer than launching takes."""
MOST_ROWS = DECODE_SIZES[-1]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: Any


class CudaGraphRunner(GraphRunner):
    """Replays what was captured for a key, and runs everything else as it comes.

    Args:
        device: the GPU. decode_sizes: rows of the decode steps to capture. mixed_sizes: tokens of the mixed ones.
    """

    def __init__(self, device: torch.device, decode_sizes: Sequence[int], mixed_sizes: Sequence[int]) -> None:
        self._device = device
        self._keys = (
            *(GraphKey(1, size, size) for size in decode_sizes),
            *(GraphKey(0, MOST_ROWS, size) for size in mixed_sizes),
        )
        self._captured: dict[GraphKey, _Captured] = {}
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def keys(self) -> Sequence[GraphKey]:
        return self._keys

    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        captured = None if key is None else self._captured.get(key)
        if captured is None:
            return work()
        captured.graph.replay()
        return captured.result

    def capture(self, key: GraphKey, work: Callable[[], Any]) -> None:
        """On a stream of its own, after a run that compiles kernels and lets libraries allocate what they keep."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            work()
            self._stream.synchronize()
            # Without torch.cuda.graph, which collects garbage each time: dozens of sizes would take a minute.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._captured[key] = _Captured(graph, result)
