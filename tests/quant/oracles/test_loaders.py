"""What is written loads in transformers and GPTQModel, and what is read means there what it means here."""

import warnings

import pytest
import torch
from quire import LLM, SamplingParams
from quire.commands import resolve_checkpoint
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_quant.layer import Recipe
from quire_quant.produce import produce
from quire_quant.testing import compressed_tensors, fp8_tensors, quantized_checkpoint, random_layer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
ROWS = torch.randint(3, 300, (10, 32), generator=torch.Generator().manual_seed(0))
PROMPT = ROWS[0].tolist()
HALF = 2e-2
"""How far log probabilities may be off where the other side multiplies in half precision."""
NEEDED = {
    "gptq": ("gptqmodel", "optimum", "accelerate"),
    "awq": ("gptqmodel", "accelerate"),
    "compressed": ("compressed_tensors", "accelerate"),
    "fp8": ("accelerate",),
}


@pytest.fixture
def needs():
    def check(method):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in NEEDED[method]:
                reason = f"pip install --no-deps {' '.join(NEEDED[method])}, and what they ask for"
                pytest.importorskip(name, reason=reason, exc_type=ImportError)

    return check


def by_quire(folder):
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=40)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    return [{token: entry.logprob for token, entry in row.items()} for row in out.prompt_logprobs[1:]]


def gap(folder, model):
    """Largest difference of a log probability between Quire's and that model's."""
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    rows = enumerate(by_quire(folder))
    return max(abs(value - theirs[row, token].item()) for row, entries in rows for token, value in entries.items())


def by_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def written(method, bits, folder):
    source = resolve_checkpoint(str(make_checkpoint("llama", folder / "plain")))
    produce(source, folder / "out", Recipe(method, bits, 32, sym=method != "awq"), ROWS)
    return folder / "out"


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 3), ("awq", 4)])
def test_what_quantize_writes_loads_in_transformers(needs, method, bits, tmp_path):
    needs(method)
    folder = written(method, bits, tmp_path)
    assert gap(folder, by_transformers(folder)) < HALF


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("awq", 4), ("awq", 3)])
def test_what_quantize_writes_loads_in_gptqmodel(needs, method, bits, tmp_path):
    needs("gptq")
    from gptqmodel import BACKEND, GPTQModel

    folder = written(method, bits, tmp_path)
    backend = BACKEND.AWQ_TORCH if (method, bits) == ("awq", 4) else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16)
    assert gap(folder, model.model) < HALF


def test_compressed_tensors_are_read_as_transformers_reads_them(needs, tmp_path):
    needs("compressed")

    def quantize(name, inputs, outputs):
        if name == "lm_head":
            return None
        layer = random_layer(inputs, outputs, 4, 32, sym=True, seed=len(name))
        return compressed_tensors(layer, 4, sym=True), layer.weight

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    settings |= {"config_groups": groups, "ignore": ["lm_head"]}
    folder, _ = quantized_checkpoint("llama", tmp_path, quantize, settings)
    assert gap(folder, by_transformers(folder)) < 1e-3


def test_fp8_is_read_as_transformers_reads_it(needs, tmp_path):
    needs("fp8")

    def quantize(name, inputs, outputs):
        if name == "lm_head":
            return None
        shape = (-(-outputs // 32), -(-inputs // 32))
        return fp8_tensors(inputs, outputs, shape, block=32, name="weight_scale_inv", seed=len(name))

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    folder, plain = quantized_checkpoint("llama", tmp_path, quantize, settings)
    assert gap(folder, reference_model(plain)) < 1e-3
    # Without a GPU transformers makes it bfloat16, which is as far off as that dtype is.
    assert gap(folder, by_transformers(folder)) < 5 * HALF
