"""The same kits on a GPU: `pytest -m gpu tests/gpu`, a process in which Triton does not interpret.

The kernels are imported within the tests, as importing them decides whether they are interpreted.
"""

import pytest
import torch
from quire import LLM, SamplingParams
from quire.plugin import SamplerInit
from quire.sampling.sampler import TorchSampler
from quire.testing.attention import AttentionConformance
from quire.testing.attention_problems import TOLERANCE
from quire.testing.device import DeviceConformance
from quire.testing.op import OpConformance
from quire.testing.sampler import RowParams, SamplerConformance, sampling_batch
from quire_cuda_paged.device import CudaDevice
from quire_cuda_paged.probe import missing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


class TestAttentionOnGpu(AttentionConformance):
    device = "cuda"
    tolerance = TOLERANCE | {torch.float32: 5e-5}

    @pytest.fixture
    def backend_class(self):
        from quire_cuda_paged.attention import CudaPagedAttention

        return CudaPagedAttention


class TestOpsOnGpu(OpConformance):
    device = "cuda"

    @pytest.fixture
    def op_set(self):
        from quire_cuda_paged.ops import CudaOps

        return CudaOps(self.init(self.device))


class TestSamplerOnGpu(SamplerConformance):
    device = "cuda"

    @pytest.fixture
    def sampler_class(self):
        from quire_cuda_paged.sampler import CudaSampler

        return CudaSampler


@pytest.mark.parametrize("vocab_size", [60, 2500, 151_936])
def test_the_sampler_draws_the_reference_samplers_tokens(vocab_size):
    from quire_cuda_paged.sampler import CudaSampler

    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    logits[::4] = logits[::4].round()  # ties
    rows = [
        RowParams(
            (0.0, 0.3, 1.0, 2.0)[i % 4], (0, 1, 50)[i % 3], (1.0, 0.9, 1e-6)[i // 3 % 3], 0.02 * (i % 2), i, 7 * i
        )
        for i in range(64)
    ]
    ours, exact = (
        kind(SamplerInit(torch.device(device), vocab_size, 64))
        .sample(logits.to(device, copy=True), sampling_batch(rows, device))
        .tolist()
        for kind, device in ((CudaSampler, "cuda"), (TorchSampler, "cpu"))
    )
    assert ours == exact


class TestCudaDevice(DeviceConformance):
    @pytest.fixture
    def device_class(self):
        return CudaDevice


def test_the_bundled_model_answers_as_on_the_cpu():
    questions = ["What is 27+45?", "Sort: 42, 7, 19", "Repeat: alpha beta gamma"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = []
    for device in ("cpu", "cuda"):
        llm = LLM(device=device, dtype="float32", num_kv_blocks=200)
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
        llm.shutdown()
    assert answers[0] == answers[1]
