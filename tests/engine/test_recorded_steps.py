"""Decode steps that are recorded on a CPU: the bits of eager ones, and eager ones where something computes unseen."""

import ctypes
import os
import random
import shutil

import pytest
import torch
from quire import LLM, SamplingParams
from quire.layers import basic
from quire.registry import HostOptions, build_host
from quire_cpu_native.build import missing
from quire_cpu_native.ops import NativeOps
from quire_cpu_native.recording import Recording

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PLUGIN = """
from quire.plugin import Provider, hookimpl

@hookimpl
def quire_providers():
    return [Provider("op", "foreign", "MODULE:ForeignOps", api=1, priority=-100, devices=frozenset({"cpu"}))]
"""
SMALL = {"num_kv_blocks": 40, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 64}


class ForeignNorm:
    """Its result comes from a function in C that neither torch nor cpu_native knows."""

    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x, weight, residual=None):
        normed, residual = self.norm(x, weight, residual)
        out = torch.empty_like(normed)
        ctypes.memmove(out.data_ptr(), normed.data_ptr(), normed.nbytes)
        return out, residual


class ForeignOps(NativeOps):
    """Says that it can run inside a graph, and is not seen by one."""

    kinds = frozenset({"rms_norm"})

    def build(self, spec):
        return ForeignNorm(super().build(spec))


@pytest.fixture
def replays(monkeypatch):
    """Grows with each replay."""
    seen, replay = [], Recording.replay

    def counted(recording):
        seen.append(recording)
        return replay(recording)

    monkeypatch.setattr(Recording, "replay", counted)
    return seen


def requests():
    """Prompts that share their beginnings; together they need more blocks than there are, and end one by one."""
    rng = random.Random(5)
    shared = [rng.randrange(4, 200) for _ in range(17)]
    prompts = [
        shared[: rng.choice((0, 9, 17))] + [rng.randrange(4, 200) for _ in range(1 + index)] for index in range(9)
    ]
    params = [
        SamplingParams(temperature=index % 2 * 0.8, seed=index, max_tokens=6 + 5 * index, ignore_eos=True, logprobs=1)
        for index in range(9)
    ]
    return prompts, params


def outcome(llm, **changes):
    """Tokens and log probabilities of two rounds; one request is aborted in its midst. `changes`: to all requests."""
    (prompts, params), engine = requests(), llm.engine
    params = [each.model_copy(update=changes) for each in params]
    kept = {}
    for turn in range(2):
        for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            engine.add(engine.prepare(f"{turn}.{index}", prompt, wanted))
        steps = 0
        while engine.has_work():
            for delta in engine.step():
                figures = [[(token, entry.logprob) for token, entry in place.items()] for place in delta.logprobs or ()]
                kept.setdefault(delta.request_id, []).append((delta.token_ids, figures, delta.finish_reason))
            steps += 1
            if steps == 20:
                engine.abort(f"{turn}.7")
    return kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"dtype": "float32"}),
        ("qwen3", {"dtype": "bfloat16"}),
        ("gemma2", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        ("gemma3", {"dtype": "float32"}),
        ("llama", {"dtype": "bfloat16", "quantization": "int4", "plugin_options": {"int4": {"group_size": 16}}}),
        ("qwen3", {"dtype": "float32", "quantization": "int8", "plugin_options": {"int8": {"group_size": 16}}}),
        ("mistral", {"dtype": "float32", "ops": {"rms_norm": "torch", "gated_act": "torch"}}),
        ("phi3", {"dtype": "float32", "async_scheduling": True}),
    ],
)
def test_recorded_steps_give_the_same_bits(checkpoint, replays, monkeypatch, name, options):
    monkeypatch.setattr(basic, "LARGE_TABLE", 1)  # a tied embedding is read from the file
    recorded, eager = (LLM(checkpoint(name), device=device, **SMALL | options) for device in ("auto", "cpu"))
    assert recorded.engine.parts.config.selected["device"].provider.name == "cpu_native"
    assert outcome(recorded) == outcome(eager)
    assert len({id(recording) for recording in replays}) == 6, "steps of one to six rows"
    assert len(replays) > 60


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"dtype": "float32"}),
        ("qwen3", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        ("qwen3", {"dtype": "bfloat16", "quantization": "int4", "plugin_options": {"int4": {"group_size": 16}}}),
        ("gemma3", {"dtype": "bfloat16"}),
        ("phi3", {"dtype": "float32", "async_scheduling": True}),
    ],
)
@pytest.mark.parametrize("changes", [{"temperature": 0, "logprobs": None}, {"logprobs": None}], ids=["greedy", "mixed"])
def test_steps_are_recorded_to_their_tokens(checkpoint, replays, monkeypatch, name, options, changes):
    """Without an operation of torch between the kernels, but for families that scale their embedding."""
    if options["dtype"] == "float32":  # as it is stored, so that its rows need not be rounded
        monkeypatch.setattr(basic, "LARGE_TABLE", 1)
    recorded, eager = (LLM(checkpoint(name), device=device, **SMALL | options) for device in ("auto", "cpu"))
    assert outcome(recorded, **changes) == outcome(eager, **changes)
    assert len({id(recording) for recording in replays}) >= 6, "steps of one to six rows"
    assert len(replays) > 60
    assert all(recording.result.dtype is torch.int32 for recording in replays)
    assert {recording.is_native for recording in replays} == {name != "gemma3"}


def test_a_file_that_is_cut_short_ends_the_request_with_the_reason(checkpoint, replays, monkeypatch, tmp_path):
    """The embedding's rows are read by a kernel, and the reader in Python says what was wrong."""
    monkeypatch.setattr(basic, "LARGE_TABLE", 1)
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "cut")
    llm = LLM(str(folder), dtype="bfloat16", quantization="int4", plugin_options={"int4": {"group_size": 16}}, **SMALL)
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add(engine.prepare("a", [5, 6, 7], params))
    while len(replays) < 4:
        engine.step()
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 100)
    (delta,) = engine.step()
    assert delta.finished
    assert "has been cut short" in delta.error


def test_a_foreign_op_set_that_computes_unseen_is_found_out(checkpoint, replays, caplog, tmp_path):
    plugin = tmp_path / "foreign.py"
    plugin.write_text(PLUGIN.replace("MODULE", __name__))
    host = build_host(HostOptions(files=(plugin,)))
    engine = LLM(checkpoint("llama"), host=host, dtype="float32", ops={"rms_norm": "foreign"}, **SMALL)
    found = outcome(engine)
    assert len(replays) == 1, "the one that has failed its proof"
    assert caplog.text.count("steps are not recorded, they run eagerly") == 1
    assert found == outcome(LLM(checkpoint("llama"), device="cpu", dtype="float32", **SMALL))


@pytest.mark.parametrize(
    ("name", "options"), [("qwen3_moe", {}), ("olmo2", {}), ("llama", {"attention_backend": "cpu_ref"})]
)
def test_who_does_not_declare_it_is_not_recorded(checkpoint, replays, caplog, name, options):
    """Experts, which the host chooses; a bridged model; the reference's attention."""
    with caplog.at_level("INFO"):
        llm = LLM(checkpoint(name), dtype="float32", **SMALL | options)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert "no graphs are captured" in caplog.text
    assert not replays


def test_a_step_that_fails_while_it_is_recorded_leaves_nothing_behind(checkpoint, replays, monkeypatch):
    """The first decode step of two rows fails; they are run again one by one, then together."""
    llm, eager = (LLM(checkpoint("llama"), device=device, dtype="float32", **SMALL) for device in ("auto", "cpu"))
    decoder, failures = llm.engine.parts.executor._model, []
    forward = type(decoder).forward

    def fails_once(self, input_ids, positions, ctx):
        hidden = forward(self, input_ids, positions, ctx)
        if len(input_ids) == 2 and not failures:
            failures.append(None)
            raise RuntimeError("broken")
        return hidden

    monkeypatch.setattr(type(decoder), "forward", fails_once)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    found, expected = (engine.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False) for engine in (llm, eager))
    assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in expected]
    assert failures
    assert replays


def test_what_is_told_at_the_start(checkpoint, caplog):
    with caplog.at_level("INFO"):
        LLM(checkpoint("llama"), dtype="float32", **SMALL | {"max_num_seqs": 3})
    assert "steps of 1 to 3 tokens are recorded when they first come" in caplog.text
    assert "captured" not in caplog.text
