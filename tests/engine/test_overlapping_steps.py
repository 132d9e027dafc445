"""Asynchronous scheduling: the same outputs as without, on a device that delivers as late as it may."""

import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire import LLM, ConfigError, SamplingParams
from quire.contract.executor import Executor
from quire.contract.sampling import LogitsProcessor
from quire.engine.inproc import InprocExecutor
from quire.engine.runner import Runner
from quire.registry import HostOptions, build_host
from quire.testing.delayed import DelayedDevice, LateCopy

PLUGIN = """
from quire.plugin import Provider, hookimpl

@hookimpl
def quire_providers():
    device = "quire.testing.delayed:DelayedDevice"
    return [
        Provider("device", "delayed", device, api=1, priority=-100, devices=frozenset({"cpu"})),
        Provider("logits_processor", "no_echo", "MODULE:NoEcho", api=1),
    ]
"""
OPTIONS = {"dtype": "float32", "deterministic": True, "block_size": 4, "logits_processors": ("no_echo",)}


class NoEcho(LogitsProcessor):
    """Forbids each of the last two tokens, which it follows in Python as a grammar would."""

    extra_args = frozenset({"no_echo"})

    @classmethod
    def needs_host_tokens(cls, params):
        return "no_echo" in (params.extra_args or {})

    def add(self, slot, request):
        return "no_echo" in (request.params.extra_args or {})

    def apply(self, logits, ctx):
        for row, (known, tokens) in enumerate(zip(ctx.num_tokens, ctx.host_token_ids, strict=True)):
            assert len(tokens) == known, "a token was not told to the host before the next step"
            logits[row, tokens[-2:]] = float("-inf")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    plugin = tmp_path_factory.mktemp("plugin") / "late.py"
    plugin.write_text(PLUGIN.replace("MODULE", __name__))
    yield build_host(HostOptions(files=(plugin,)))
    sys.modules.pop("late", None)  # else, where the module's tests run in two pieces, the second cannot load its own


@pytest.fixture(scope="module")
def engines(checkpoint, host):
    """(synchronous, overlapping): the same small pool, so that requests are preempted."""

    def make(**options):
        return LLM(checkpoint("llama"), host=host, num_kv_blocks=34, max_num_seqs=6, max_num_batched_tokens=24,
                   max_model_len=100, **OPTIONS, **options)  # fmt: skip

    return make(async_scheduling=False), make(device="delayed")


def params_of(rng):
    """Everything that looks at tokens: ends of all kinds, processors, log probabilities, forks."""
    return SamplingParams(
        n=rng.choice((1, 1, 1, 2)),
        temperature=rng.choice((0.0, 0.9)),
        top_k=rng.choice((0, 5)),
        seed=rng.randrange(99),
        max_tokens=rng.choice((1, 2, 9, 30)),
        min_tokens=rng.choice((0, 1)),
        stop=rng.choice(((), ("e", "zz"), ("a",))),
        stop_token_ids=rng.choice(((), tuple(range(40, 60)), tuple(range(100, 180)))),
        ignore_eos=rng.random() < 0.7,
        logprobs=rng.choice((None, None, 0, 3)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        logit_bias=rng.choice((None, {7: 3.0})),
        extra_args=rng.choice((None, None, {"no_echo": 1})),
    )


def traffic(seed):
    """(steps before it comes, prompt, params, steps until it is aborted or None) of some requests."""
    rng = random.Random(seed)
    shared = [rng.randrange(4, 300) for _ in range(20)]
    return [
        (
            rng.choice((0, 0, 1, 5)),
            shared[: rng.choice((0, 9, 20))] + [rng.randrange(4, 300) for _ in range(rng.randrange(1, 12))],
            params_of(rng),
            rng.choice((None, None, None, rng.randrange(12))),
        )
        for _ in range(rng.randrange(1, 8))
    ]


def run(llm, asked):
    """request -> index -> [tokens, text, log probabilities, prompt's, end], and whether it was aborted."""
    engine, outputs, aborts, aborted = llm.engine, {}, {}, set()

    def take(deltas):
        for delta in deltas:
            told = outputs.setdefault(delta.request_id, {}).setdefault(delta.index, [[], "", [], [], None])
            assert told[4] is None, "told something after the end"
            told[0] += delta.token_ids
            told[1] += delta.text
            told[2] += delta.logprobs or ()
            told[3] += (delta.prompt_logprobs or ()) if delta.index == 0 else ()
            told[4] = (delta.finish_reason, delta.stop_reason, delta.error) if delta.finish_reason else None

    def step():
        take(engine.step())
        engine.parts.allocator.check()
        for key in [key for key, left in aborts.items() if left == 0]:
            deltas = engine.abort(key)
            aborted.update([key] if deltas else [])
            take(deltas)
        for key in aborts:
            aborts[key] -= 1

    for index, (wait, prompt, params, abort) in enumerate(asked):
        for _ in range(wait):
            step()
        engine.add(engine.prepare(str(index), prompt, params))
        if abort is not None:
            aborts[str(index)] = abort
    while engine.has_work():
        step()
    stats = engine.kv_stats()
    assert (stats.used, stats.free) == (0, stats.total), "blocks were lost"
    return outputs, aborted


def assert_same(asked, engines):
    (expected, aborted), (overlapped, aborted_too) = (run(llm, asked) for llm in engines)
    assert expected.keys() == overlapped.keys()
    for key in expected:
        for index, told in overlapped[key].items():
            other = expected[key].get(index, [[], "", [], [], None])
            if key in aborted | aborted_too:
                shorter, longer = sorted((told, other), key=lambda item: len(item[0]))
                assert longer[0][: len(shorter[0])] == shorter[0]
            else:
                assert told == other, (key, index)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_outputs_whether_steps_overlap_or_not(engines, seed):
    assert_same(traffic(seed), engines)


def test_overlapping_happens_and_so_does_preemption(engines):
    asked = [(0, [5 + index] * 12, SamplingParams(temperature=0.8, seed=index, max_tokens=40, ignore_eos=True), None)
             for index in range(6)]  # fmt: skip
    assert_same(asked, engines)
    device = engines[1].engine.config.device
    assert isinstance(device, DelayedDevice)
    assert device.most_in_flight == 2
    assert device.num_started == device.num_waited
    assert engines[1].engine.scheduler_stats().num_preemptions > 0


def test_only_requests_that_need_their_tokens_wait(engines):
    """A request that is followed on the host runs in every second step; its neighbour in every one."""
    engine = engines[1].engine
    common = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    engine.add(engine.prepare("free", [9, 8], SamplingParams(**common)))
    engine.add(engine.prepare("bound", [9, 8, 7], SamplingParams(**common, extra_args={"no_echo": 1})))
    ended = {}
    for number in range(100):
        for delta in engine.step():
            if delta.finished:
                ended[delta.request_id] = number
    assert ended["bound"] >= 2 * ended["free"] - 2
    assert not engine.has_work()


def test_a_token_behind_the_end_is_dropped(engines):
    """A request that ends by a token was scheduled once more; neither its blocks nor its text show it."""
    _, llm = engines
    probe = llm.generate([[7, 7, 9]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    tokens = probe[0].outputs[0].token_ids
    stop = tokens[4]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    (output,) = llm.generate([[7, 7, 9]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == tokens[: tokens.index(stop) + 1]
    assert llm.engine.kv_stats().used == 0


def test_every_step_is_waited_for_even_if_it_brings_nothing(engines):
    """A chunk of a prompt samples nothing, but its inputs' buffer may only be used again when it has been read."""
    engine = engines[1].engine
    device, steps = engine.config.device, {engine.last_step}  # the last of an earlier test, or None
    before = device.num_waited
    engine.add(engine.prepare("long", [9] * 90, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
    while engine.has_work():
        engine.step()
        steps.add(engine.last_step)
    assert device.num_waited - before == len(steps) - 1 >= 5


@pytest.fixture
def overlapping(checkpoint, host):
    return LLM(checkpoint("llama"), host=host, num_kv_blocks=200, device="delayed", **OPTIONS)


def test_a_step_that_fails_when_it_is_awaited_ends_its_requests_only(overlapping, monkeypatch):
    """The device's failures show when its results are asked for, and the next step is in flight by then."""
    engine, params = overlapping.engine, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (expected,) = overlapping.generate([[3, 4]], params, use_tqdm=False)
    wait = LateCopy.wait
    failing = engine.config.device.num_waited + 2

    def broken(copy):
        tensors = wait(copy)
        if copy.number == failing:
            raise RuntimeError("device-side assert")
        return tensors

    monkeypatch.setattr(LateCopy, "wait", broken)
    engine.add(engine.prepare("early", [5, 6], params))
    deltas = engine.step() + engine.step()
    engine.add(engine.prepare("late", [3, 4], params))
    while engine.has_work():
        deltas += engine.step()
    ends = {delta.request_id: (delta.finish_reason, delta.error) for delta in deltas if delta.finished}
    reason, error = ends["early"]
    assert (reason, error.endswith("): RuntimeError: device-side assert")) == ("error", True)
    assert error.startswith("the step failed in plugin ")  # the device of this file
    assert ends["late"] == ("length", None)
    late = [token for delta in deltas if delta.request_id == "late" for token in delta.token_ids]
    assert late == expected.outputs[0].token_ids
    assert engine.kv_stats().used == 0
    engine.parts.allocator.check()


def test_one_poisonous_request_among_steps_in_flight(overlapping, monkeypatch):
    """A launch that fails is taken apart while the step before it is still in flight."""
    poison, good = 211, [[5, 6, 7 + index] for index in range(6)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=4, logprobs=1,
                            repetition_penalty=1.2, bad_token_ids=(poison,))  # fmt: skip
    expected = [output.outputs[0] for output in overlapping.generate(good, params, use_tqdm=False)]
    model = overlapping.engine.parts.executor._model
    real = model.forward

    def forward(input_ids, positions, ctx):
        if (input_ids == poison).any():
            raise RuntimeError("poison")
        return real(input_ids, positions, ctx)

    monkeypatch.setattr(model, "forward", forward)
    engine = overlapping.engine
    for index, prompt in enumerate(good):
        engine.add(engine.prepare(f"good {index}", prompt, params))
    deltas = engine.step() + engine.step() + engine.step()
    engine.add(engine.prepare("bad", [5, poison], params))
    while engine.has_work():
        deltas += engine.step()
    for index, output in enumerate(expected):
        mine = [delta for delta in deltas if delta.request_id == f"good {index}"]
        assert [token for delta in mine for token in delta.token_ids] == output.token_ids
        assert [entry for delta in mine for entry in delta.logprobs or ()] == output.logprobs
    (bad,) = [delta for delta in deltas if delta.request_id == "bad"]
    assert bad.finish_reason == "error"
    assert bad.error.startswith("the step failed")
    assert bad.error.endswith(": RuntimeError: poison")
    assert engine.kv_stats().used == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_a_poisonous_request_that_shows_when_its_step_is_awaited_ends_alone(overlap, checkpoint, host, monkeypatch):
    """The step behind it was launched on tokens that nobody sampled; all others' outputs are what they should be."""
    llm = LLM(checkpoint("llama"), host=host, num_kv_blocks=200, device="delayed", async_scheduling=overlap, **OPTIONS)
    good = [[5, 6, 7 + index] for index in range(6)]
    common = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.9, "seed": 4, "logprobs": 1}
    params = [
        SamplingParams(**common, repetition_penalty=1.2, frequency_penalty=0.5,
                       extra_args={"no_echo": 1} if index == 2 else None)
        for index in range(len(good))
    ]  # fmt: skip
    expected = [output.outputs[0] for output in llm.generate(good, params, use_tqdm=False)]
    engine, (wait, launch) = llm.engine, (LateCopy.wait, Runner._launch_rows)
    poisoned, failures = set(), []

    def launched(runner, rows, times):
        running = launch(runner, rows, times)
        if any(row.request_id.startswith("bad") for row in rows):
            poisoned.add(running.copy)
            table = runner._rows.token_ids  # what a broken kernel leaves
            for row in rows:
                if row.samples:
                    table[row.slot, row.num_computed_tokens + row.num_new_tokens] = 3
        return running

    def broken(copy):
        tensors = wait(copy)
        if copy in poisoned:
            failures.append(copy)
            raise RuntimeError("device-side assert")
        return tensors

    monkeypatch.setattr(Runner, "_launch_rows", launched)
    monkeypatch.setattr(LateCopy, "wait", broken)
    for index, prompt in enumerate(good[:4]):
        engine.add(engine.prepare(f"good {index}", prompt, params[index]))
    deltas = engine.step() + engine.step() + engine.step()
    for index, prompt in enumerate(good[4:], start=4):
        engine.add(engine.prepare(f"good {index}", prompt, params[index]))
    engine.add(engine.prepare("bad", [5, 6], params[0]))
    while engine.has_work():
        deltas += engine.step()
    for index, output in enumerate(expected):
        mine = [delta for delta in deltas if delta.request_id == f"good {index}"]
        assert [token for delta in mine for token in delta.token_ids] == output.token_ids, index
        assert [entry for delta in mine for entry in delta.logprobs or ()] == output.logprobs
    (bad,) = [delta for delta in deltas if delta.request_id == "bad"]
    assert bad.finish_reason == "error"
    assert bad.error.endswith(": RuntimeError: device-side assert")
    assert 2 < len(failures) < 14
    assert engine.kv_stats().used == 0
    engine.parts.allocator.check()


def test_a_request_that_breaks_its_step_is_one_failure(overlapping, monkeypatch):
    """Nothing is launched behind a launch that failed, so that failures are not counted twice."""
    with monkeypatch.context() as patch:
        patch.setattr(overlapping.engine.parts.executor._model, "forward", lambda *args: 1 / 0)
        for _ in range(2):
            (output,) = overlapping.generate([[3, 4]], SamplingParams(max_tokens=5), use_tqdm=False)
            assert output.outputs[0].finish_reason == "error"
    (output,) = overlapping.generate([[3, 4]], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"


def test_on_auto_the_device_decides(checkpoint, host, monkeypatch):
    def resolved(**options):
        llm = LLM(checkpoint("llama"), host=host, dtype="float32", num_kv_blocks=20, **options)
        return llm.engine.config.to_dict()["async_scheduling"]

    assert resolved(device="delayed") is True
    assert resolved(device="delayed", async_scheduling=False) is False
    assert resolved(device="cpu") is False
    assert resolved(device="cpu", async_scheduling=True) is True
    monkeypatch.setattr(InprocExecutor, "max_in_flight", Executor.max_in_flight)
    assert resolved(device="delayed") is False
    with pytest.raises(ConfigError, match="one step at a time"):
        resolved(async_scheduling=True)
