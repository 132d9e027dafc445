"""The CPU as a device that records its decode steps: the calls of a step's kernels are noted once, then run as one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from quire.plugin import DeviceInit, GraphKey, GraphRunner, HostDevice, HostDeviceOptions
from torch import Tensor

from quire_cpu_native.native import native
from quire_cpu_native.recording import Recorder, Recording, Workspace

logger = logging.getLogger(__name__)

RECORDED_SIZES = tuple(range(1, 65))
"""Rows of the recorded decode steps. With more of them kernels take so long that what surrounds them is little."""
PATIENCE = 4
"""Rows for each time that a size must come until it is recorded, since its proof takes as long as a step of it."""


class NativeDeviceOptions(HostDeviceOptions):
    """Options of the `cpu_native` device."""

    recorded_sizes: tuple[PositiveInt, ...] = RECORDED_SIZES
    """Rows of the decode steps that are recorded; none: every step runs eagerly."""


class NativeDevice(HostDevice):
    """The machine's processor and main memory; decode steps of few rows are recorded."""

    def __init__(self, init: DeviceInit) -> None:
        super().__init__(init)
        self._sizes = (init.options or NativeDeviceOptions()).recorded_sizes

    def graph_runner(self) -> GraphRunner:
        return RecordingRunner(self._sizes)


class RecordingRunner(GraphRunner):
    """Runs steps eagerly until their key's recording has proven itself, then replays that.

    A key's first step is recorded as it runs, or a later one if it has many rows. At the next one the recording is
    replayed on memory that was spoilt, and then the step is run eagerly: if both do not agree, something computes
    unseen (kernels of somebody else, values that the host carries), and nothing is recorded any more. What recordings
    hold are the activations of one step, of the largest size.

    Args:
        sizes: rows of the decode steps to record.
    """

    lazy: ClassVar[bool] = True

    def __init__(self, sizes: Sequence[int]) -> None:
        self._keys = tuple(GraphKey(1, size, size) for size in sizes)
        self._workspace = Workspace()
        self._seen: Counter[GraphKey] = Counter()
        self._new: dict[GraphKey, Recording] = {}
        self._proven: dict[GraphKey, Recording] = {}
        self._refused = False

    def keys(self) -> Sequence[GraphKey]:
        return self._keys

    def capture(self, key: GraphKey, work: Callable[[], Any]) -> None:
        """Forget the key's recording: the caches that it reads may have been replaced."""
        self._new.pop(key, None)
        self._proven.pop(key, None)

    def replay(self, key: GraphKey) -> Any:
        proven = self._proven.get(key)
        return proven.replay() if proven is not None and proven.is_native else None

    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        if key is None or self._refused:
            return work()
        proven = self._proven.get(key)
        if proven is not None:
            return proven.replay()
        new = self._new.pop(key, None)
        if new is not None:
            return self._prove(key, new, work)
        self._seen[key] += 1
        return self._record(key, work) if self._seen[key] * PATIENCE >= key.num_reqs else work()

    def _record(self, key: GraphKey, work: Callable[[], Any]) -> Any:
        recorder = Recorder(self._workspace, native(torch.get_num_threads()))
        result = recorder.run(work)
        if recorder.why_not:
            self._refuse(recorder.why_not)
        else:
            self._new[key] = recorder.recording(result)
        return result

    def _prove(self, key: GraphKey, recording: Recording, work: Callable[[], Any]) -> Any:
        recording.spoil()
        try:
            replayed = recording.replay()
        except Exception as error:
            self._refuse(f"a replay failed: {type(error).__name__}: {error}")
            return work()
        result = work()
        if same_bits(replayed, result):
            self._proven[key] = recording
        else:
            self._refuse("a replay gave another result, as something computes beside torch and cpu_native's kernels")
        return result

    def _refuse(self, reason: str) -> None:
        logger.warning("steps are not recorded, they run eagerly: %s", reason)
        self._refused = True
        self._new.clear()
        self._proven.clear()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether both hold the same bits, which numbers that are none may have, too."""
    if first.shape != second.shape or first.dtype is not second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
