"""Devices: the only place that knows streams, pinned memory, graphs and how much memory there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of the device: in all, and free to this process now.

    Attributes:
        total: in all. free: what this process may still take.
        kv_share: share of the free bytes that becomes the KV pool unless the user says more; the rest is for
            whatever else runs on the machine.
    """

    total: int
    free: int
    kv_share: float = 0.5


Ending = Literal["hidden", "greedy", "drawn"]
"""Where a step's work ends, as in `GraphKey`."""


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """What a captured graph is keyed by: padded sizes, and the uniform query length (0: mixed).

    `ending`: the work ends at the hidden states, or at the rows' tokens, which it also stores for the next step: the
    largest logits, or those drawn. Runners name sizes alone; to lazy ones, unless their device is asynchronous, the
    engine gives work with other endings as well, under keys of its own.
    """

    uniform_query_len: int
    num_reqs: int
    num_tokens: int
    ending: Ending = "hidden"


@dataclass(frozen=True, slots=True)
class DeviceInit:
    """All that a device is constructed from.

    Attributes:
        index: which of several; -1: the default one.
        options: the validated instance of `Provider.options`, or None.
    """

    index: int = -1
    options: Any = None


class GraphRunner(ABC):
    """Runs a step's device work, eagerly or by replaying what was captured for its key."""

    lazy: ClassVar[bool] = False
    """True if `run` captures a key's work when it first comes, and `capture` but forgets what was captured before.

    `run` may then both run the work and replay it.
    """

    @abstractmethod
    def keys(self) -> Sequence[GraphKey]:
        """Sizes worth padding to; empty: every step runs eagerly at its exact size."""

    @abstractmethod
    def run(self, key: GraphKey | None, work: Callable[[], Any]) -> Any:
        """Run `work`, or its captured form for `key`; None: eagerly.

        For one key, `work` reads and writes the same addresses every time. The result of a captured form is
        overwritten by the next run with any key, and so is all memory that `work` has asked for: what must outlive a
        step is made before.
        """

    def replay(self, key: GraphKey) -> Any:
        """What `run` would give, of a captured form that needs no work any more; None, as by default: `run` is called.

        Asked of lazy runners only, and outside of torch's inference mode, in which all else happens.
        """
        return None

    def capture(self, key: GraphKey, work: Callable[[], Any]) -> None:
        """Prepare `run` for this key, before anything is served: largest keys first. Raises if it cannot be done.

        `work` may be run any number of times; it computes on padding. What was captured for the key before is of no
        use any more. The default prepares nothing.
        """


class HostCopy:
    """A copy to the host that was started. This one had ended when it was made; others derive theirs."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU, once they have arrived. Raises what the device's work failed with.

        Where the host computes they may be what was copied itself, to be read before the next step.
        """
        return self._tensors


class Device(ABC):
    """One device. Nothing else in Quire asks for memory, streams or graphs.

    Work is handed to a device in order. A device that says `runs_async` returns from a call before its work
    has ended; `copy_to_host` and `synchronize` are then the only ways to learn that it has.

    One that computes where the host does derives from `HostDevice`, which answers for all of this.
    """

    runs_async: ClassVar[bool] = False
    """True if calls return before their work has ended, so that the host may prepare the next step meanwhile."""

    def __init__(self, init: DeviceInit) -> None:
        self.init = init

    @abstractmethod
    def torch_device(self) -> torch.device:
        """The device that tensors are made on."""

    @abstractmethod
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Compute dtypes that run well, best first."""

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """Bytes in all and free."""

    @abstractmethod
    def graph_runner(self) -> GraphRunner:
        """A new runner."""

    @abstractmethod
    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed CPU tensor that copies to the device fast (pinned, where that exists)."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed tensor for the KV cache, which may take most of the device's memory.

        Raises torch.OutOfMemoryError, RuntimeError or MemoryError if there is not so much.
        """
        return torch.zeros(*shape, dtype=dtype, device=self.torch_device())

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work that was handed to the device has ended."""

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Start to copy the tensors, behind all work that was handed over before.

        They must not be written until the copy was waited for. With no tensors at all it is that work which is
        waited for. The default copies at once.
        """
        return HostCopy([tensor.to("cpu", copy=True) for tensor in tensors])

    def peak_memory(self, work: Callable[[], Any]) -> int:
        """Bytes that `work` needs for a while, beyond what is held after it; it is run to measure them.

        The default runs nothing and answers 0: the host's memory grows as it is needed.
        """
        return 0
