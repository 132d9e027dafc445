"""Captured steps, without a GPU: a runner that keeps a key's first work and runs that again, whatever it is given.

It sees new content only where it stood the first time, so a changed address, shape or scalar shows as a wrong token.
"""

import sys

import pytest
import torch
from quire import LLM, OutOfMemory, SamplingParams
from quire.contract.attention import AttentionBackend, AttentionCaps, GraphSupport
from quire.contract.device import GraphKey, GraphRunner, MemoryInfo
from quire.contract.host_device import HostDevice
from quire.contract.sampling import all_finite
from quire.engine import batch, staging
from quire.registry import HostOptions, build_host
from quire.sampling.sampler import TorchSampler
from quire.testing.delayed import DelayedDevice

PLUGIN = """
from quire.plugin import Provider, hookimpl

@hookimpl
def quire_providers():
    cpu = frozenset({"cpu"})
    return [
        Provider("device", "graphed", "MODULE:GraphedDevice", api=1, priority=-100, devices=cpu),
        Provider("device", "lazy", "MODULE:LazyDevice", api=1, priority=-100, devices=cpu),
        Provider("sampler", "chooses", "MODULE:ChoosingSampler", api=1, priority=-100, devices=cpu),
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


class LazyRecorder(Recorder):
    """Keeps a key's work when it first comes."""

    lazy = True

    def capture(self, key, work):
        self.kept.pop(key, None)

    def run(self, key, work):
        self.used.append(key)
        if key is None:
            return work()
        if key not in self.kept:
            self.kept[key], self.results[key] = work, work()
        return self.results[key].copy_(self.kept[key]())


class LazyDevice(HostDevice):
    """Work has ended when a call returns."""

    recorder: LazyRecorder

    def graph_runner(self):
        return self.recorder


class ChoosingSampler(TorchSampler):
    """Takes the logits as they are."""

    def choose(self, logits, batch):
        return torch.where(all_finite(logits), self.sample(logits, batch), -1).to(torch.int32)


@pytest.fixture
def make(checkpoint, tmp_path, monkeypatch):
    """options -> (engine that replays, its recorder)."""
    plugin = tmp_path / "graphed.py"
    plugin.write_text(PLUGIN.replace("MODULE", __name__))
    host = build_host(HostOptions(files=(plugin,)))

    def build(name="llama", refuse=(), runner=Recorder, **options):
        recorder = runner(refuse)
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


@pytest.fixture
def lazy(make, monkeypatch):
    """options -> (engine whose runner keeps work when it first comes, that runner)."""

    def build(**options):
        recorder = LazyRecorder()
        monkeypatch.setattr(LazyDevice, "recorder", recorder, raising=False)
        return make(device="lazy", sampler="chooses", **options)[0], recorder

    return build


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("few", [64, 0])
def test_decode_steps_end_at_their_tokens(make, lazy, monkeypatch, overlapping, temperature, few):
    """Padded ones too: steps of three and five rows are computed as four and six. Many are staged as any others are."""
    monkeypatch.setattr(batch, "FEW", few)
    monkeypatch.setattr(staging, "ALIGNMENT", 8)  # so that one row more would move what stands behind
    params = [
        SamplingParams(temperature=temperature, seed=count, top_k=20 * (count % 2), max_tokens=count, ignore_eos=True)
        for count in (6, 4, 8, 3, 5)
    ]
    llm, recorder = lazy(async_scheduling=overlapping)
    found, expected = (
        [output.outputs[0].token_ids for output in engine.generate(PROMPTS, params, use_tqdm=False)]
        for engine in (llm, make(device="cpu")[0])
    )
    assert found == expected
    decodes = [key for key in recorder.used if key.uniform_query_len == 1]
    assert {key.num_reqs for key in decodes} == {1, 4, 6}
    assert {key.ending for key in decodes} == {"drawn" if temperature else "greedy"}


def test_greedy_rows_and_drawn_ones_go_together(make, lazy):
    params = [
        SamplingParams(temperature=temperature, seed=3, top_p=0.9, max_tokens=count, ignore_eos=True)
        for temperature, count in ((0.0, 9), (0.7, 4), (0.0, 6), (1.2, 5), (0.9, 3))
    ]
    llm, recorder = lazy()
    found, expected = (
        [output.outputs[0].token_ids for output in engine.generate(PROMPTS, params, use_tqdm=False)]
        for engine in (llm, make(device="cpu")[0])
    )
    assert found == expected
    assert {key.ending for key in recorder.used if key.uniform_query_len == 1} == {"drawn", "greedy"}


@pytest.mark.parametrize(
    "asks",
    [{"logprobs": 2}, {"prompt_logprobs": 1}, {"repetition_penalty": 1.3}, {"logit_bias": {3: 1.0}}],
)
def test_one_row_that_asks_for_more_has_the_whole_step_end_at_hidden_states(make, lazy, asks):
    """As long as it runs: the others go on longer."""
    params = [SamplingParams(temperature=0, max_tokens=9, ignore_eos=True) for _ in PROMPTS]
    params[1] = SamplingParams(**{"temperature": 0, "max_tokens": 5, "ignore_eos": True} | asks)
    llm, recorder = lazy()
    found, expected = (
        [
            (output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs)
            for output in engine.generate(PROMPTS, params, use_tqdm=False)
        ]
        for engine in (llm, make(device="cpu")[0])
    )
    assert found == expected
    used = {(key.num_reqs, key.ending) for key in recorder.used if key is not None and key.uniform_query_len == 1}
    assert used == {(6, "hidden"), (4, "greedy")}


def test_results_that_an_asynchronous_device_would_overwrite_are_not_asked_for(make):
    """It begins the next step, which writes them anew, before they are read."""
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (6, 4, 8, 3, 5)]
    llm, recorder = make(runner=LazyRecorder, sampler="chooses")
    found, expected = (
        [output.outputs[0].token_ids for output in engine.generate(PROMPTS, params, use_tqdm=False)]
        for engine in (llm, make(device="cpu")[0])
    )
    assert found == expected
    assert {key.ending for key in recorder.used if key is not None} == {"hidden"}


def test_without_a_choice_steps_end_at_hidden_states(make, monkeypatch):
    recorder = LazyRecorder()
    monkeypatch.setattr(LazyDevice, "recorder", recorder, raising=False)
    llm, _ = make(device="lazy", sampler="torch")
    assert tokens(llm) == tokens(make(device="cpu")[0])
    assert {key.ending for key in recorder.used if key is not None} == {"hidden"}


def test_a_greedy_row_whose_logits_are_not_finite_ends_alone(lazy):
    """The next step's input is a token nevertheless, and the other rows' tokens stay what they are."""
    llm, recorder = lazy()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:3], params, use_tqdm=False)]
    engine, kept = llm.engine, {}
    for index, prompt in enumerate(PROMPTS[:3]):
        engine.add(engine.prepare(str(index), prompt, params))
    model, steps = engine.parts.executor._model, 0
    logits = type(model).logits

    def spoilt(self, hidden):
        found = logits(self, hidden)
        found[1 : 1 + (steps == 6)] = float("nan")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "logits", spoilt)
        while engine.has_work():
            for delta in engine.step():
                kept.setdefault(delta.request_id, []).append(delta)
            steps += 1
    errors = {key: deltas[-1].error for key, deltas in kept.items()}
    assert [key for key, error in errors.items() if error] == ["1"]
    assert "finite" in errors["1"]
    found = [[token for delta in kept[str(index)] for token in delta.token_ids] for index in range(3)]
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert found[1] == expected[1][: len(found[1])]
    assert GraphKey(1, 4, 4, "greedy") in recorder.used


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
