"""Executors: where the model lives and its steps run (this process, others)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.contract.request import Schedule, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorInit:
    """All that an executor is constructed from.

    Attributes:
        config: the resolved configuration; names and options only, so a worker process can
            resolve the plugins again.
        registry: this process's registry, for executors that stay in it.
        options: the validated instance of `Provider.options`, or None.
    """

    config: Any
    registry: Any
    options: Any = None


@dataclass(frozen=True, slots=True)
class KVBudget:
    """What the pool can be: bytes of one block over all layers, and bytes free for blocks.

    `kv_share` is the share of the free bytes that the pool takes by itself, as in `MemoryInfo`.
    """

    bytes_per_block: int
    free_bytes: int
    kv_share: float = 0.5


class Executor(ABC):
    """Runs schedules, in the order in which they are handed over. Called from the engine's thread only."""

    max_in_flight: ClassVar[int] = 1
    """Schedules that may be handed over before the first one's result is asked for; 2 lets steps overlap."""

    def __init__(self, init: ExecutorInit) -> None:
        self.init = init

    @abstractmethod
    def start(self) -> None:
        """Load the model. Raises ConfigError if it cannot run here."""

    @abstractmethod
    def kv_budget(self) -> KVBudget:
        """Measured after `start`: what KV blocks cost and how much room there is."""

    @abstractmethod
    def allocate_kv(self, num_blocks: int) -> None:
        """Make the caches and warm up; then `step` may be called. Raises OutOfMemory."""

    @abstractmethod
    def step(self, schedule: Schedule) -> Future[StepResult]:
        """Run one schedule. A failure of the step as a whole is the future's exception.

        With `max_in_flight` 2 the future may be asked after the next `step`; results are asked for in order.
        An empty schedule only tells what was released; its result may be ignored.
        """

    @abstractmethod
    def health(self) -> str | None:
        """None if the executor can serve, else the reason why not."""

    @abstractmethod
    def shutdown(self) -> None:
        """Let everything go; idempotent."""
