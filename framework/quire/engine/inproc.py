"""The executor that runs the model in the engine's own process."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from quire.contract.attention import AttentionBackend, KVCaches, TensorSpec
from quire.contract.executor import Executor, ExecutorInit, KVBudget
from quire.contract.model import CausalLM
from quire.contract.request import Schedule, StepResult
from quire.engine.build import build_attention, build_model, build_pipeline
from quire.engine.runner import Runner, RunnerParts
from quire.errors import EngineError, OutOfMemory
from quire.resolve import ResolvedConfig


class InprocExecutor(Executor):
    """Loads the model here and runs each schedule before `step` returns."""

    def __init__(self, init: ExecutorInit) -> None:
        super().__init__(init)
        self._config: ResolvedConfig = init.config
        self._device = self._config.device
        self._host = init.registry
        self._model: CausalLM | None = None
        self._runner: Runner | None = None
        self._backend: AttentionBackend | None = None

    def start(self) -> None:
        self._model = build_model(self._config, self._host)
        self._backend = build_attention(self._config, self._host, self._model)

    def kv_budget(self) -> KVBudget:
        bytes_per_block = sum(
            torch.empty(spec.shape, dtype=spec.dtype, device="meta").nbytes
            for layer_specs in self._kv_specs()
            for spec in layer_specs
        )
        return KVBudget(bytes_per_block, self._device.memory().free)

    def allocate_kv(self, num_blocks: int) -> None:
        config, model = self._config, self._loaded()
        assert self._backend is not None
        pipeline = build_pipeline(config, self._host, model.vocab_size)
        self._runner = Runner(
            RunnerParts(
                model=model,
                backend=self._backend,
                device=self._device,
                kv=self._make_caches(num_blocks),
                pipeline=pipeline,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                block_size=config.block_size,
            )
        )

    def step(self, schedule: Schedule) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        if self._runner is None:
            raise EngineError("the executor has not been started")
        try:
            future.set_result(self._runner.run(schedule))
        except Exception as error:
            future.set_exception(error)
        return future

    def health(self) -> str | None:
        return None if self._runner is not None else "the executor has not been started, or was shut down"

    def shutdown(self) -> None:
        self._runner = self._model = self._backend = None

    def _loaded(self) -> CausalLM:
        if self._model is None:
            raise EngineError("the executor has not been started")
        return self._model

    def _kv_specs(self) -> list[tuple[TensorSpec, ...]]:
        """The cache tensors of each layer, indexed by layer id."""
        layers = sorted(self._loaded().attention_layers, key=lambda layer: layer.layer_id)
        backend = type(self._backend) if self._backend is not None else AttentionBackend
        return [backend.kv_spec(layer, self._config.block_size, self._config.cache_dtype) for layer in layers]

    def _make_caches(self, num_blocks: int) -> tuple[KVCaches, ...]:
        device = self._device.torch_device()
        try:
            return tuple(
                tuple(torch.zeros(num_blocks, *spec.shape, dtype=spec.dtype, device=device) for spec in specs)
                for specs in self._kv_specs()
            )
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"the KV cache of {num_blocks} blocks does not fit into memory: {error}",
                remedy="lower num_kv_blocks, kv_cache_memory or max_num_seqs",
            ) from error
