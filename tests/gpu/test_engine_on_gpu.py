"""The engine's side on a GPU: graphs, steps that overlap, memory. `pytest -m gpu tests/gpu`."""

import pytest
import torch
from quire import LLM, SamplingParams
from quire.contract.device import DeviceInit, GraphKey
from quire.testing.executor import ExecutorConformance
from quire_cuda_paged.device import CudaDevice
from quire_cuda_paged.graphs import CudaGraphRunner
from quire_cuda_paged.probe import missing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

QUESTIONS = [
    "What is 27+45?",
    "Sort: 42, 7, 19",
    "Repeat: alpha beta gamma",
    "Who won the cup in 1987?",
    "What is 3+4?",
]
EAGER = {"graph_decode_sizes": (), "graph_mixed_sizes": ()}


class TestExecutorOnGpu(ExecutorConformance):
    device = "cuda"

    @pytest.fixture
    def executor_class(self):
        from quire.engine.inproc import InprocExecutor

        return InprocExecutor


def answers(params, **options):
    llm = LLM(device="cuda", dtype="float32", num_kv_blocks=300, **options)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(chats, params, use_tqdm=False)
    stats = llm.engine.kv_stats()
    captured = llm.engine.parts.executor._runner._forward._graphs._captured
    llm.shutdown()
    assert stats.used == 0
    return [output.outputs[0].token_ids for output in outputs], len(captured)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0.8, seed=3, max_tokens=40, repetition_penalty=1.2, logprobs=2),
    ],
)
def test_graphs_and_overlap_change_no_token(params):
    plain, captured = answers(params, async_scheduling=False, plugin_options={"cuda": EAGER})
    assert captured == 0
    overlapped, _ = answers(params, async_scheduling=True, plugin_options={"cuda": EAGER})
    assert overlapped == plain
    graphed, captured = answers(params)
    assert captured > 0, "nothing was captured"
    assert graphed == plain


def test_a_replay_reads_what_stands_at_its_addresses():
    runner = CudaGraphRunner(torch.device("cuda"), (4,), ())
    key, x = GraphKey(1, 4, 4), torch.ones(4, device="cuda")
    runner.capture(key, lambda: x * 2)
    x.fill_(5)
    assert runner.run(key, lambda: x * 0).tolist() == [10.0] * 4
    assert runner.run(None, lambda: x * 3).tolist() == [15.0] * 4


def test_a_copy_brings_what_was_there_when_it_was_started():
    device = CudaDevice(DeviceInit())
    copies = []
    for value in range(5):
        copies.append(device.copy_to_host([torch.full((1 << 20,), value, device="cuda")]))
    for value, copy in enumerate(copies):
        (tensor,) = copy.wait()
        assert tensor.is_pinned()
        assert (tensor == value).all()


def test_the_peak_of_some_work_is_measured():
    device = CudaDevice(DeviceInit())
    peak = device.peak_memory(lambda: torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_())
    assert 1 << 28 <= peak <= 1.5 * (1 << 28)
    assert device.memory().kv_share == 1.0
