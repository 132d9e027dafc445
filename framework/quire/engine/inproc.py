"""The executor that runs the model in the engine's own process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar

import torch

from quire.contract.attention import AttentionBackend, KVCaches, TensorSpec
from quire.contract.device import GraphKey
from quire.contract.executor import Executor, ExecutorInit, KVBudget
from quire.contract.model import CausalLM
from quire.contract.request import Schedule, StepResult
from quire.engine.build import build_attention, build_layers, build_model, build_pipeline
from quire.engine.preparing import StepSizes
from quire.engine.runner import Runner, RunnerParts
from quire.engine.warmup import capture_graphs, peak_bytes
from quire.errors import EngineError, OutOfMemory, PluginError
from quire.resolve import ResolvedConfig

logger = logging.getLogger(__name__)


class _Collected(Future[StepResult]):
    """A step in flight: whoever asks for its result waits for the device, in the asking thread."""

    def __init__(self, collect: Callable[[], StepResult]) -> None:
        super().__init__()
        self._collect = collect

    def result(self, timeout: float | None = None) -> StepResult:
        self._settle()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._settle()
        return super().exception(timeout)

    def _settle(self) -> None:
        if not self.done():
            try:
                self.set_result(self._collect())
            except Exception as error:
                self.set_exception(error)


class InprocExecutor(Executor):
    """Loads the model here. `step` launches a schedule; its future's `result` waits for the device."""

    max_in_flight: ClassVar[int] = 2

    def __init__(self, init: ExecutorInit) -> None:
        super().__init__(init)
        self._config: ResolvedConfig = init.config
        self._device = self._config.device
        self._host = init.registry
        self._model: CausalLM | None = None
        self._runner: Runner | None = None
        self._backend: AttentionBackend | None = None
        self._has_caches = False

    def start(self) -> None:
        config = self._config
        layers = build_layers(config, self._host)
        try:
            self._model = model = build_model(config, self._host, layers=layers)
            self._backend = backend = build_attention(config, self._host, model)
            self._runner = Runner(
                RunnerParts(
                    model=model,
                    backend=backend,
                    device=self._device,
                    graph_support={"attention": backend.caps.graph, "the model": model.graph, **layers.graph_support},
                    pipeline=build_pipeline(config, self._host, model.vocab_size),
                    sizes=StepSizes(
                        max_num_seqs=config.max_num_seqs,
                        max_num_batched_tokens=config.max_num_batched_tokens,
                        max_model_len=config.max_model_len,
                        block_size=config.block_size,
                    ),
                    blame=self._host.blame,
                )
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            weights = sum(tensor.num_bytes for tensor in config.checkpoint.tensors.values())
            raise OutOfMemory(
                f"the model, {weights / 2**30:.1f} GiB of weights, does not fit into the memory of "
                f"{self._device.torch_device()}, {self._device.memory().total / 2**30:.1f} GiB: {error}",
                remedy="free memory, choose a quantized or smaller model, or lower max_num_seqs or max_model_len",
            ) from error

    def kv_budget(self) -> KVBudget:
        bytes_per_block = sum(
            torch.empty(spec.shape, dtype=spec.dtype, device="meta").nbytes
            for layer_specs in self._kv_specs()
            for spec in layer_specs
        )
        config, runner = self._config, self._started()
        largest = GraphKey(0, min(config.max_num_seqs, config.max_num_batched_tokens), config.max_num_batched_tokens)
        if not self._has_caches:
            runner.attach(self._make_caches(1))  # the null block is all that padding needs
        try:
            peak = peak_bytes(runner, self._device, largest)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(
                f"a step of {largest.num_tokens} tokens and {largest.num_reqs} requests does not fit beside the model: "
                f"{error}",
                remedy="lower max_num_batched_tokens or max_num_seqs",
            ) from error
        except Exception as error:
            if where := self._host.blame(error):
                reason = f"a first step failed{where}: {type(error).__name__}: {error}"
                raise PluginError(reason, remedy="`quire --debug ...` shows where") from error
            raise
        memory = self._device.memory()
        logger.info("a step takes up to %.2f GiB; %.2f GiB are free", peak / 2**30, memory.free / 2**30)
        return KVBudget(bytes_per_block, max(0, memory.free - peak), memory.kv_share)

    def allocate_kv(self, num_blocks: int) -> None:
        runner = self._started()
        runner.attach(self._make_caches(num_blocks))
        capture_graphs(runner, self._device)
        self._has_caches = True

    def step(self, schedule: Schedule) -> Future[StepResult]:
        if (reason := self.health()) is not None:
            raise EngineError(reason)
        runner = self._started()
        try:
            launched = runner.launch(schedule)
        except Exception as error:
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed
        return _Collected(lambda: runner.collect(launched))

    def health(self) -> str | None:
        if self._runner is None:
            return "the executor has not been started, or was shut down"
        return None if self._has_caches else "the executor has no KV caches yet"

    def shutdown(self) -> None:
        self._runner = self._model = self._backend = None
        self._has_caches = False

    def _started(self) -> Runner:
        if self._runner is None:
            raise EngineError("the executor has not been started")
        return self._runner

    def _kv_specs(self) -> list[tuple[TensorSpec, ...]]:
        """The cache tensors of each layer, indexed by layer id."""
        assert self._model is not None
        layers = sorted(self._model.attention_layers, key=lambda layer: layer.layer_id)
        backend = type(self._backend) if self._backend is not None else AttentionBackend
        return [backend.kv_spec(layer, self._config.block_size, self._config.cache_dtype) for layer in layers]

    def _make_caches(self, num_blocks: int) -> tuple[KVCaches, ...]:
        try:
            return tuple(
                tuple(self._device.zeros((num_blocks, *spec.shape), spec.dtype) for spec in specs)
                for specs in self._kv_specs()
            )
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"the KV cache of {num_blocks} blocks does not fit into memory: {error}",
                remedy="lower num_kv_blocks, kv_cache_memory or max_num_seqs",
            ) from error
