"""Captured steps, without a GPU: a runner that keeps a key's first work and runs that again, whatever it is given.

It sees new content only where it stood the first time, so a changed address, shape or scalar shows as a wrong token.
"""

import sys

import pytest
import torch
from quire import LLM, OutOfMemory, SamplingParams
from quire.contract.attention import AttentionBackend, AttentionCaps, GraphSupport
from quire.contract.device import GraphKey, GraphRunner, MemoryInfo
from quire.registry import HostOptions, build_host
from quire.testing.delayed import DelayedDevice

PLUGIN = """
from quire.plugin import Provider, hookimpl

@hookimpl
def quire_providers():
    cpu = frozenset({"cpu"})
    return [
        Provider("device", "graphed", "MODULE:GraphedDevice", api=1, priority=-100, devices=cpu),
        Provider("attention", "shaped", "MODULE:ShapedAttention", api=1, priority=-100, devices=cpu),
    ]
"""


class ShapedAttention(AttentionBackend):
    """Every shape follows from the batch's padded sizes alone, as inside a graph it must."""

    caps = AttentionCaps(device_types=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), graph=GraphSupport.ANY)

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        token = torch.arange(batch.num_tokens)
        row = torch.searchsorted(batch.query_start_loc[1:].contiguous(), token, right=True)
        row = row.clamp(max=batch.num_reqs - 1)
        ends = batch.query_start_loc[1:][row]
        position = batch.seq_lens[row] - ends + token
        width = batch.block_table.shape[1] * batch.block_size
        at = torch.arange(width)
        slots = batch.block_table[row][:, at // batch.block_size].long() * batch.block_size + at % batch.block_size
        group = layer.num_heads // layer.num_kv_heads
        keys, values = (cache.flatten(0, 1)[slots].repeat_interleave(group, 2) for cache in kv)
        scores = torch.einsum("thd,tkhd->thk", q, keys) * layer.scale
        scores = scores.masked_fill((at > position[:, None])[:, None], float("-inf"))
        out.copy_(torch.einsum("thk,tkhd->thd", scores.softmax(-1), values).nan_to_num())


class Recorder(GraphRunner):
    """See the module's docstring. `used`: keys of all runs. `refuse`: keys that cannot be captured."""

    def __init__(self, refuse=()):
        self.kept, self.results, self.used, self.refuse = {}, {}, [], refuse

    def keys(self):
        return [GraphKey(1, size, size) for size in (1, 2, 4, 8, 16)] + [GraphKey(0, 64, 24)]

    def capture(self, key, work):
        if key in self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert not self.kept or key.num_tokens <= min(other.num_tokens for other in self.kept)
        self.kept[key], self.results[key] = work, work()

    def run(self, key, work):
        self.used.append(key)
        if key not in self.kept:
            return work()
        return self.results[key].copy_(self.kept[key]())


class GraphedDevice(DelayedDevice):
    """A device whose steps are replayed."""

    peak = 0
    recorder: Recorder

    def memory(self):
        return MemoryInfo(1 << 30, 1 << 20)

    def graph_runner(self):
        return self.recorder

    def peak_memory(self, work):
        work()
        return self.peak


@pytest.fixture
def make(checkpoint, tmp_path, monkeypatch):
    """options -> (engine that replays, its recorder)."""
    plugin = tmp_path / "graphed.py"
    plugin.write_text(PLUGIN.replace("MODULE", __name__))
    host = build_host(HostOptions(files=(plugin,)))

    def build(name="llama", refuse=(), **options):
        recorder = Recorder(refuse)
        monkeypatch.setattr(GraphedDevice, "recorder", recorder, raising=False)
        common = {"device": "graphed", "attention_backend": "shaped", "dtype": "float32", "num_kv_blocks": 60}
        common["ops"] = {"default": "torch"}  # which can all run inside a graph, but for experts
        sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 64}
        return LLM(checkpoint(name), host=host, **common | sizes | options), recorder

    yield build
    sys.modules.pop("graphed", None)


PROMPTS = [[5, 6, 7], [8] * 30, [9], [4, 3], [10, 11]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    for count in (6, 4, 8, 3, 5)
]


def tokens(llm):
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(o.outputs[0].token_ids, len(o.prompt_logprobs)) for o in outputs]


def test_replayed_steps_give_the_same_tokens(make):
    graphed, recorder = make()
    plain, _ = make(device="cpu")
    assert tokens(graphed) == tokens(plain)
    assert set(recorder.kept) == {GraphKey(1, size, size) for size in (1, 2, 4, 6)} | {GraphKey(0, 6, 24)}
    assert {GraphKey(0, 6, 24), GraphKey(1, 4, 4), GraphKey(1, 6, 6), GraphKey(1, 1, 1)} <= set(recorder.used)
    assert None not in recorder.used


def test_a_capture_that_fails_is_told_once_and_the_rest_runs_eagerly(make, caplog):
    with caplog.at_level("INFO"):
        graphed, recorder = make(refuse=(GraphKey(1, 4, 4),))
    assert set(recorder.kept) == {GraphKey(0, 6, 24), GraphKey(1, 6, 6)}
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert "graphs of 3 sizes are not used" in caplog.text
    plain, _ = make(device="cpu")
    assert tokens(graphed) == tokens(plain)


@pytest.mark.parametrize(("quantization", "culprit"), [(None, "op moe of"), ("int8", "the model cannot run inside")])
def test_what_cannot_run_inside_a_graph_is_named(make, caplog, quantization, culprit):
    """Experts are chosen on the host, by plain torch; quantized ones by the model."""
    options = {} if quantization is None else {"ops": {"quant_linear": "dequant", "default": "torch"}}
    options |= {"quantization": quantization, "plugin_options": {"int8": {"group_size": 16}}}
    with caplog.at_level("INFO"):
        _, recorder = make("qwen3_moe", **options)
    assert not recorder.kept
    assert culprit in caplog.text


def test_what_steps_take_is_left_out_of_the_pool(make, monkeypatch):
    roomy, _ = make(num_kv_blocks=None, max_num_seqs=40, max_num_batched_tokens=40)
    monkeypatch.setattr(GraphedDevice, "peak", 300_000)
    tight, _ = make(num_kv_blocks=None, max_num_seqs=40, max_num_batched_tokens=40)
    taken = roomy.engine.parts.executor.kv_budget().free_bytes, tight.engine.parts.executor.kv_budget().free_bytes
    assert taken == ((1 << 20) - 600_000,) * 2, "twice: the largest step, and the graphs"
    assert tight.engine.parts.num_kv_blocks < roomy.engine.parts.num_kv_blocks
    assert tokens(tight) == tokens(roomy), "asking for the budget again must leave the caches alone"
    with pytest.raises(OutOfMemory, match="40 KV blocks"):
        make(num_kv_blocks=40, block_size=64)


def test_a_model_or_step_that_does_not_fit_is_refused(make, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(GraphedDevice, "peak_memory", full)
        with pytest.raises(OutOfMemory, match="24 tokens and 6 requests does not fit"):
            make()
    monkeypatch.setattr("quire.engine.build.load_model", full)
    with pytest.raises(OutOfMemory, match="GiB of weights"):
        make()
