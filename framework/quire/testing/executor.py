"""Conformance of executors: a tiny model's tokens through real schedules, held against transformers.

The core's own scheduler and allocator make the schedules, in pools that are short, so preemption, forks,
copies and slots that change hands all occur. Every token that an executor samples greedily must be the most
likely one of transformers for the tokens before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.contract.executor import Executor, ExecutorInit
from quire.contract.kv import KVInit
from quire.contract.request import NewRow, Request, Schedule, ScheduledRow, StepResult
from quire.contract.scheduling import PolicyInit, Scheduler, SchedulerInit
from quire.engine.build import build_front, configured_by
from quire.errors import EngineError
from quire.params import SamplingParams
from quire.registry import PluginHost, build_host
from quire.resolve import ResolvedConfig
from quire.testing.clock import VirtualClock
from quire.testing.tiny_models import VOCAB, make_checkpoint, reference_model

BLOCK_SIZE = 4
MAX_NUM_SEQS = 4
BUDGET = 16
MAX_LEN = 64
WAIT_S = 60.0
"""Longest wait for a step of an executor that works elsewhere."""
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
PROMPTS: Sequence[Sequence[int]] = (range(10, 32), (5,), range(40, 49), range(10, 27), (7, 9), range(60, 95))


class ExecutorConformance:
    """What every executor must hold. Subclass, and give the fixture `executor_class`."""

    device = "cpu"
    options: object = None
    """The instance of `Provider.options` to construct it with, or None."""
    tolerance = 1e-3
    """How much less likely than the best token a sampled one may be, and the error of a log probability."""

    @pytest.fixture
    def executor_class(self) -> type[Executor]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `executor_class`")

    @pytest.fixture
    def host(self) -> PluginHost:
        """The plugins that it resolves names with."""
        return build_host()

    @pytest.fixture
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny checkpoint, made once per test session."""
        folder = tmp_path_factory.getbasetemp() / "checkpoint-qwen3"
        return folder if folder.exists() else make_checkpoint("qwen3", folder)

    @pytest.fixture
    def config(self, folder: Path, host: PluginHost) -> ResolvedConfig:
        """What the engine would decide for the checkpoint."""
        options = {
            "device": self.device,
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": BUDGET,
            "max_model_len": MAX_LEN,
        }
        return build_front(configured_by(str(folder), options, None), host).config

    @pytest.fixture
    def init(self, config: ResolvedConfig, host: PluginHost) -> ExecutorInit:
        return ExecutorInit(config, host, self.options)

    def test_from_start_to_shutdown(self, executor_class: type[Executor], init: ExecutorInit) -> None:
        """`health` gives a reason until the caches are there and after `shutdown`, which may be called twice; a step
        before that is refused.

        If it fails: derive `health` from what is held, and refuse a step with EngineError, raised or as the future's.
        """
        executor = executor_class(init)
        assert executor.health() is not None
        with pytest.raises(EngineError):
            executor.step(Schedule(0)).result(WAIT_S)
        executor.start()
        executor.allocate_kv(8)
        assert executor.health() is None
        executor.shutdown()
        executor.shutdown()
        assert executor.health() is not None
        executor_class(init).shutdown()  # it may end before it has begun

    def test_kv_budget(self, executor_class: type[Executor], init: ExecutorInit) -> None:
        """A block costs what its keys and values of all layers take at least, and there is room for some.

        If it fails: sum the backend's `kv_spec` over all layers, in bytes; `free_bytes` is the device's, now.
        """
        executor = executor_class(init)
        executor.start()
        budget = executor.kv_budget()
        layers = init.config.spec.attention_layers(init.config.model_config)
        elements = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers)
        assert budget.bytes_per_block >= BLOCK_SIZE * elements * init.config.dtype.itemsize // 4  # caches may be packed
        assert budget.free_bytes > 0
        executor.shutdown()

    @pytest.mark.parametrize("num_blocks", [12, 40])
    def test_tokens_equal_transformers(
        self, executor_class: type[Executor], init: ExecutorInit, host: PluginHost, folder: Path, num_blocks: int
    ) -> None:
        """Prompts in chunks, decodes beside them, forks, a cache that is hit and (in the small pool) preemption: every
        token is the most likely one, with its log probability.

        If it fails: in the small pool only, look at rows that return at another slot and at `Schedule.copies`, which
        run in order and before the step; else at positions of chunks, and at slots that `released` gives back.
        """
        reference = reference_model(folder)
        with _running(executor_class, init, num_blocks) as executor:
            requests = run_requests(executor, host, num_blocks)
        for request, logprobs in requests.values():
            self.check_request(reference, request, logprobs)

    def test_tokens_stay_the_same_when_steps_overlap(
        self, executor_class: type[Executor], init: ExecutorInit, host: PluginHost
    ) -> None:
        """Two schedules at a time: the second is handed over before the first one's result is asked for.

        If it fails: what a step samples must reach the next one without the host; nothing of a step that is in flight
        may be overwritten; results come in order.
        """
        if executor_class.max_in_flight < 2:
            pytest.skip("takes one step at a time")
        outputs = []
        for depth in (1, 2):
            with _running(executor_class, init, 40) as executor:
                requests = run_requests(executor, host, 40, depth)
            outputs.append({name: request.output_token_ids for name, (request, _) in requests.items()})
        assert outputs[0] == outputs[1]

    def check_request(self, reference: Any, request: Request, logprobs: Sequence[float]) -> None:
        """Hold one finished request's tokens and log probabilities against transformers."""
        assert len(request.output_token_ids) == len(logprobs) == GREEDY.max_tokens
        with torch.inference_mode():
            exact = reference(torch.tensor([list(request.token_ids)])).logits[0].float().log_softmax(-1)
        for index, (token, logprob) in enumerate(zip(request.output_token_ids, logprobs, strict=True)):
            row = exact[request.num_prompt_tokens + index - 1]
            assert row[token] >= row.max() - self.tolerance, f"{request.request_id}: token {index} is another"
            assert abs(float(row[token]) - logprob) < self.tolerance, f"{request.request_id}: log probability {index}"

    def test_answers_stand_in_the_schedules_order(self, executor_class: type[Executor], init: ExecutorInit) -> None:
        """One result per row, in the order of the rows, with the schedule's step id; a row that samples nothing has no
        token, an empty schedule gives no rows.

        If it fails: build `StepResult.rows` from `Schedule.rows`, whatever order the model ran them in.
        """
        with _running(executor_class, init, 12) as executor:
            new = tuple(_new_row(slot, f"r{slot}", range(5, 9 + slot)) for slot in (2, 0, 1))
            rows = tuple(
                ScheduledRow(row.slot, row.request_id, 0, count, (1 + 2 * row.slot, 2 + 2 * row.slot), samples)
                for row, count, samples in zip(new, (6, 2, 5), (True, False, True), strict=True)
            )
            answer = executor.step(Schedule(7, new_rows=new, rows=rows, num_tokens=13)).result(WAIT_S)
            assert answer.step_id == 7
            assert [row.request_id for row in answer.rows] == ["r2", "r0", "r1"]
            assert [row.token_id is not None for row in answer.rows] == [True, False, True]
            assert all(row.error is None for row in answer.rows)
            assert min(answer.build_s, answer.forward_s, answer.sample_s) >= 0.0
            empty = executor.step(Schedule(8, released=(0, 1, 2))).result(WAIT_S)
            assert (empty.step_id, empty.rows) == (8, ())

    def test_a_slot_forgets_its_request(self, executor_class: type[Executor], init: ExecutorInit) -> None:
        """A request at a slot that another has left gets what it gets at a fresh one.

        If it fails: clear the slot's tokens, block table and processors' state for `Schedule.released`, before
        `new_rows` are taken.
        """
        with _running(executor_class, init, 12) as executor:
            first = _alone(executor, 0, "first", range(20, 32), (1, 2, 3), released=())
            forbidden = SamplingParams(temperature=0, bad_token_ids=(first,), max_tokens=1)
            other = _alone(executor, 1, "other", range(20, 32), (4, 5, 6), released=(0,), params=forbidden)
            assert other != first
            assert _alone(executor, 2, "again", range(20, 32), (7, 8, 9), released=(0,)) == first
            assert _alone(executor, 3, "short", (5, 6), (7,), released=(0,)) == _alone(
                executor, 4, "fresh", (5, 6), (10,), released=(), slot=3
            )

    def test_a_failed_step_is_told(self, executor_class: type[Executor], init: ExecutorInit) -> None:
        """A step that cannot be computed is the future's exception, or its row's error; the next step goes on.

        If it fails: catch what the model raises and set it on the future; leave the executor able to serve.
        """
        if self.device != "cpu":
            pytest.skip("a token outside the vocabulary ends other devices' contexts")
        with _running(executor_class, init, 12) as executor:
            expected = _alone(executor, 0, "good", (5, 6, 7), (1,), released=())
            future = _step_alone(executor, 1, "bad", (5, VOCAB + 1000, 7), (2,), released=(0,))
            assert isinstance(future, Future), "a failure is told by the future, never raised by `step`"
            assert future.exception(WAIT_S) is not None or future.result().rows[0].error is not None
            assert executor.health() is None
            assert _alone(executor, 2, "good again", (5, 6, 7), (3,), released=(0,)) == expected


@contextmanager
def _running(executor_class: type[Executor], init: ExecutorInit, num_blocks: int) -> Iterator[Executor]:
    """An executor with caches, shut down afterwards."""
    executor = executor_class(init)
    try:
        executor.start()
        executor.allocate_kv(num_blocks)
        yield executor
    finally:
        executor.shutdown()


def run_requests(
    executor: Executor, host: PluginHost, num_blocks: int, depth: int = 1
) -> dict[str, tuple[Request, list[float]]]:
    """Run PROMPTS, and a fork of the first, with the core's scheduler; each request with its log probabilities.

    `depth`: schedules that are handed over before the first one's result is asked for.
    """
    clock = VirtualClock()
    scheduler: Scheduler = host.load("scheduler", "continuous")(
        SchedulerInit(
            allocator=host.load("kv_allocator", "paged")(KVInit(num_blocks, BLOCK_SIZE)),
            policy=host.load("scheduler_policy", "fcfs")(PolicyInit()),
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=BUDGET,
            max_model_len=MAX_LEN,
            clock=clock,
        )
    )
    requests = {"0": _request("0", PROMPTS[0], clock()), "fork": _request("fork", PROMPTS[0], clock(), fork_of="0")}
    requests |= {f"{index}": _request(f"{index}", PROMPTS[index], clock()) for index in range(1, len(PROMPTS))}
    told: dict[str, list[float]] = {name: [] for name in requests}
    for request in requests.values():
        scheduler.add(request)
    flying: deque[tuple[Schedule, Future[StepResult]]] = deque()
    for _ in range(1000):
        if not scheduler.has_work():
            assert num_blocks > 20 or scheduler.stats().num_preemptions, "the small pool is meant to be short"
            return {name: (request, told[name]) for name, request in requests.items()}
        schedule = scheduler.schedule()
        flying.append((schedule, executor.step(schedule)))
        while len(flying) >= (1 if schedule.is_empty else depth):
            landed, future = flying.popleft()
            for update in scheduler.update(landed, future.result(WAIT_S)):
                assert update.error is None, update.error
                told[update.request.request_id] += [entry.logprob for entry in update.logprobs]
        clock.advance(0.05)
    raise AssertionError("the requests do not end")


def _request(name: str, prompt: Sequence[int], now: float, fork_of: str | None = None) -> Request:
    return Request(name, tuple(prompt), GREEDY, now, GREEDY.max_tokens or 1, frozenset(), fork_of=fork_of)


def _new_row(slot: int, name: str, tokens: Sequence[int], params: SamplingParams = GREEDY) -> NewRow:
    return NewRow(slot, name, tuple(tokens), len(tokens), params, seed=0, stop_token_ids=frozenset())


def _step_alone(
    executor: Executor,
    step_id: int,
    name: str,
    tokens: Sequence[int],
    blocks: tuple[int, ...],
    *,
    released: tuple[int, ...],
    params: SamplingParams = GREEDY,
    slot: int = 0,
) -> Future[StepResult]:
    """A step of one request that computes its whole prompt."""
    row = ScheduledRow(slot, name, 0, len(tokens), blocks, samples=True)
    new = (_new_row(slot, name, tokens, params),)
    return executor.step(Schedule(step_id, released, new, (row,), num_tokens=len(tokens)))


def _alone(executor: Executor, *arguments: Any, **options: Any) -> int:
    """The token that such a step samples."""
    token = _step_alone(executor, *arguments, **options).result(WAIT_S).rows[0].token_id
    assert token is not None
    return token
