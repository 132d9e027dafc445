"""Processors against formulas in plain Python, and the pipeline that runs them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quire import RequestError, SamplingParams
from quire.contract.sampling import LogitsProcessor, ProcessorRequest, SamplerInit
from quire.errors import PluginError
from quire.sampling.logprobs import logprob_entries, logprob_figures
from quire.sampling.pipeline import NOT_FINITE, NOTHING_ALLOWED, SamplingColumns, SamplingPipeline, validate_params
from quire.sampling.processors import LogitBias, MinTokens, Penalties, TokenFilter
from quire.sampling.sampler import TorchSampler

V = 12
INIT = SamplerInit(torch.device("cpu"), V, 4)
BUILT_IN = (TokenFilter, LogitBias, MinTokens, Penalties)


def pipeline(*extra):
    processors = [(kind.__name__, kind(INIT)) for kind in (*BUILT_IN, *extra)]
    return SamplingPipeline(TorchSampler(INIT), processors, INIT)


def request(params, prompt=(1, 2), output=(), stops=(0,)):
    return ProcessorRequest("r", params, (*prompt, *output), len(prompt), frozenset(stops))


def token_buffer(*rows):
    buffer = torch.zeros(4, 64, dtype=torch.int32)
    for slot, tokens in enumerate(rows):
        buffer[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return buffer


def penalised(logits, params, prompt, output):
    counts = Counter(output)
    result = []
    for token, logit in enumerate(logits):
        if params.repetition_penalty != 1 and (token in counts or token in prompt):
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        result.append(logit - params.frequency_penalty * counts[token] - params.presence_penalty * (counts[token] > 0))
    return result


@given(
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
    output=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
    split=st.integers(0, 8),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.7, -1.0]),
    presence=st.sampled_from([0.0, 1.5]),
)
@settings(max_examples=100, deadline=None)
def test_penalties(prompt, output, split, repetition, frequency, presence):
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, max_tokens=None
    )
    processor, split = Penalties(INIT), min(split, len(output))
    active = processor.add(0, request(params, prompt, output[:split]))
    assert active == ((repetition, frequency, presence) != (1.0, 0.0, 0.0))
    if not active:
        return
    logits = torch.linspace(-2, 2, V)
    buffer = token_buffer([*prompt, *output])
    for known in range(len(prompt) + split, len(prompt) + len(output) + 1):
        changed = logits.clone()[None]
        from quire.contract.sampling import ProcessorContext

        processor.apply(changed, ProcessorContext([0], [known], buffer))
        wanted = penalised(logits.tolist(), params, prompt, output[: known - len(prompt)])
        assert changed[0].tolist() == pytest.approx(wanted, abs=1e-5)


def run(pipe, logits, slots=(0,), lengths=(2,), buffer=None):
    buffer = token_buffer([1, 2]) if buffer is None else buffer
    batch = pipe.columns(slots, lengths).batch(torch.from_numpy)
    result = pipe.run(logits.clone(), list(slots), list(lengths), buffer, batch)
    return result.read(result.tensors())


def test_each_processor_changes_its_own_rows_only():
    pipe = pipeline()
    pipe.add(0, request(SamplingParams(temperature=0, allowed_token_ids=(3, 4), bad_token_ids=(4,))), 0)
    pipe.add(1, request(SamplingParams(temperature=0)), 0)
    pipe.add(2, request(SamplingParams(temperature=0, logit_bias={5: 100.0})), 0)
    pipe.add(3, request(SamplingParams(temperature=0, min_tokens=2, max_tokens=9)), 0)
    logits = torch.zeros(4, V)
    logits[:, 0] = 1.0
    result = run(pipe, logits, (3, 0, 1, 2), (2, 2, 2, 2))
    assert result.token_ids == [1, 3, 0, 5]
    # The two-token prompt has two outputs now, so the minimum is reached.
    assert run(pipe, logits[:2], (3, 1), (4, 4)).token_ids == [0, 0]
    assert run(pipe, logits[:2], (3, 1), (3, 3)).token_ids == [1, 0]


def test_greedy_rows_skip_processors_that_leave_the_most_likely_token():
    class Last(LogitsProcessor):
        """Lies about being invariant, so that it shows which rows it ran for."""

        argmax_invariant = True

        def add(self, slot, request):
            return True

        def apply(self, logits, ctx):
            logits[:, :-1] = float("-inf")

    pipe = pipeline(Last)
    pipe.add(0, request(SamplingParams(temperature=0)), 0)
    pipe.add(1, request(SamplingParams(temperature=1)), 0)
    logits = torch.zeros(2, V)
    assert run(pipe, logits, (0, 1), (2, 2)).token_ids == [0, V - 1]


class Asked(TorchSampler):
    """Remembers how it was asked."""

    def __init__(self, init):
        super().__init__(init)
        self.calls = []

    def sample(self, logits, batch):
        self.calls.append(("sample", logits.dtype))
        return super().sample(logits, batch)

    def choose(self, logits, batch):
        self.calls.append(("choose", logits.dtype))
        return torch.where(logits.isfinite().all(-1), TorchSampler.sample(self, logits, batch), -1).to(torch.int32)


@pytest.mark.parametrize(
    ("others", "call"),
    [
        ([{}], "choose"),
        ([{"repetition_penalty": 1.0}, {"top_k": 3}], "choose"),
        ([{"temperature": 1.0}], "choose"),
        ([{"logprobs": 0}], "sample"),
        ([{"logit_bias": {3: -1.0}}], "sample"),
        ([{}, {"presence_penalty": 0.5}], "sample"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choose_alone_runs_where_nothing_else_looks_at_the_logits(others, call, dtype):
    sampler = Asked(INIT)
    pipe = SamplingPipeline(sampler, [(kind.__name__, kind(INIT)) for kind in BUILT_IN], INIT)
    for slot, fields in enumerate([{}, *others]):
        pipe.add(slot, request(SamplingParams(**{"temperature": 0, **fields})), 0)
    slots = tuple(range(1 + len(others)))
    logits = torch.randn(len(slots), V, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[:, 7] = 9.0
    assert run(pipe, logits, slots, (2,) * len(slots)).token_ids[0] == 7
    assert sampler.calls == [(call, dtype if call == "choose" else torch.float32)]
    logits[0, 3] = float("nan")
    assert run(pipe, logits, slots, (2,) * len(slots)).errors == [NOT_FINITE] + [None] * len(others)


@pytest.mark.parametrize("answer", [7, torch.zeros(1, 1, dtype=torch.int32)])
def test_a_sampler_whose_choose_gives_no_token_ids_is_named(answer):
    class Wrong(TorchSampler):
        def choose(self, logits, batch):
            return answer

    pipe = SamplingPipeline(Wrong(INIT), [], INIT)
    pipe.add(0, request(SamplingParams(temperature=0)), 0)
    with pytest.raises(PluginError, match=r"Wrong.choose returned .*; token ids \[R\] are needed"):
        run(pipe, torch.zeros(1, V))


@pytest.mark.parametrize(
    "asks",
    [
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.2},
        {"bad_token_ids": (4,)},
    ],
)
def test_the_work_goes_on_to_tokens_where_nobody_else_looks_at_the_logits(asks):
    pipe = SamplingPipeline(Asked(INIT), [(kind.__name__, kind(INIT)) for kind in BUILT_IN], INIT)
    pipe.add(0, request(SamplingParams(temperature=0, top_k=3)), 0)
    assert pipe.ending([0]) == "hidden", "nobody knows yet whether the sampler can"
    run(pipe, torch.randn(1, V))
    assert pipe.ending([0]) == "greedy"
    pipe.add(1, request(SamplingParams(temperature=0.5)), 0)
    assert pipe.ending([0, 1]) == "hidden", "nor whether it can draw"
    run(pipe, torch.randn(2, V), (0, 1), (2, 2))
    assert (pipe.ending([0, 1]), pipe.ending([1]), pipe.ending([0])) == ("drawn", "drawn", "greedy")
    pipe.add(2, request(SamplingParams(**{"temperature": 0, **asks})), 0)
    assert (pipe.ending([0, 1, 2]), pipe.ending([2]), pipe.ending([0])) == ("hidden", "hidden", "greedy")
    pipe.remove(2)
    pipe.add(2, request(SamplingParams(temperature=0)), 0)
    assert pipe.ending([0, 2]) == "greedy"


def test_a_processor_that_leaves_the_largest_alone_watches_drawn_rows():
    class Invariant(LogitsProcessor):
        argmax_invariant = True

        def add(self, slot, request):
            return True

        def apply(self, logits, ctx):
            pass

    pipe = SamplingPipeline(Asked(INIT), [("invariant", Invariant(INIT))], INIT)
    for slot, temperature in enumerate((0.0, 1.0)):
        pipe.add(slot, request(SamplingParams(temperature=temperature)), 0)
    pipe._chooses |= {"greedy", "drawn"}
    assert (pipe.ending([0]), pipe.ending([1])) == ("greedy", "hidden")


def test_without_choose_and_for_failed_rows_the_work_ends_at_hidden_states():
    class Fails(LogitsProcessor):
        def add(self, slot, request):
            raise RuntimeError("broken")

        def apply(self, logits, ctx):
            pass

    pipe = pipeline()
    pipe.add(0, request(SamplingParams(temperature=0)), 0)
    run(pipe, torch.randn(1, V))
    assert pipe.ending([0]) == "hidden"
    pipe = SamplingPipeline(Asked(INIT), [("fails", Fails(INIT))], INIT)
    pipe.add(0, request(SamplingParams(temperature=0)), 0)
    pipe._chooses.add("greedy")
    assert pipe.ending([0]) == "hidden"


def test_columns_that_are_filled_are_those_that_are_made():
    pipe = pipeline()
    for slot in range(4):
        fields = {"temperature": slot / 2, "top_k": slot, "top_p": 1 - slot / 8, "min_p": slot / 9}
        pipe.add(slot, request(SamplingParams(**fields)), 2**63 + slot)
    for slots in ([2, 0, 3], [1], [3, 2, 1, 0]):
        made = pipe.columns(slots, [slot + 7 for slot in slots])
        kinds = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        room = SamplingColumns(*(np.zeros(4, dtype=getattr(made, kind).dtype) for kind in kinds))
        pipe.fill(room, slots, [slot + 7 for slot in slots])
        for kind in kinds:
            filled, wanted = getattr(room, kind).tolist(), getattr(made, kind).tolist()
            assert filled == wanted + wanted[:1] * (4 - len(slots))


def test_slots_forget_their_requests():
    pipe = pipeline()
    pipe.add(0, request(SamplingParams(temperature=0, logit_bias={5: 100.0}, logprobs=1)), 0)
    pipe.remove(0)
    pipe.add(0, request(SamplingParams(temperature=0)), 0)
    result = run(pipe, torch.arange(V).float()[None])
    assert (result.token_ids, result.logprobs) == ([V - 1], [None])


def test_logprobs_are_raw_and_ranked():
    pipe = pipeline()
    pipe.add(0, request(SamplingParams(temperature=0, logit_bias={3: 100.0}, logprobs=2)), 0)
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5] + [-1.0] * (V - 4))
    (entry,) = run(pipe, logits[None]).logprobs
    exact = torch.log_softmax(logits.double(), 0)
    assert (entry.token_id, entry.rank, entry.top_ids) == (3, 3, (2, 1))
    assert entry.logprob == pytest.approx(float(exact[3]), abs=1e-9)
    assert entry.top_logprobs == pytest.approx([float(exact[2]), float(exact[1])], abs=1e-9)
    assert math.isclose(sum(math.exp(float(value)) for value in exact), 1.0)


def test_prompt_logprobs_follow_their_targets():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 1, 4, 1, 5])
    entries = logprob_entries(logprob_figures(logits, targets, [0] * 5), [0] * 5)
    exact = torch.log_softmax(logits.double(), -1)
    assert [entry.token_id for entry in entries] == targets.tolist()
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(exact[row, targets[row]]), abs=1e-9)


def test_bad_rows_fail_alone():
    class Broken(LogitsProcessor):
        extra_args = frozenset({"broken"})

        def add(self, slot, request):
            return "broken" in (request.params.extra_args or {})

        def apply(self, logits, ctx):
            raise ZeroDivisionError("oops")

    pipe = pipeline(Broken)
    pipe.add(0, request(SamplingParams(extra_args={"broken": 1})), 0)
    pipe.add(1, request(SamplingParams(temperature=0)), 0)
    pipe.add(2, request(SamplingParams(temperature=0)), 0)
    pipe.add(3, request(SamplingParams(temperature=0, allowed_token_ids=(0,), min_tokens=1, max_tokens=2)), 0)
    logits = torch.zeros(4, V)
    logits[2, 5] = float("nan")
    result = run(pipe, logits, (0, 1, 2, 3), (2, 2, 2, 2))
    assert "Broken" in result.errors[0]
    assert "oops" in result.errors[0]
    assert result.errors[1:] == [None, NOT_FINITE, NOTHING_ALLOWED]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": (V,)}, "allowed_token_ids"),
        ({"bad_token_ids": (99,)}, "bad_token_ids"),
        ({"logit_bias": {V: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (V,)}, "stop_token_ids"),
        ({"allowed_token_ids": (1,), "bad_token_ids": (1,)}, "bad_token_ids"),
        ({"extra_args": {"mystery": 1}}, "extra_args"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, param):
    with pytest.raises(RequestError) as caught:
        validate_params(SamplingParams(**fields), V, BUILT_IN)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"n": 17}, ["n", "17", "16"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"min_tokens": 5, "max_tokens": 3}, ["min_tokens", "5", "3"]),
        ({"stop": ["x" * 200]}, ["128", "200"]),
        ({"logprobs": 21}, ["logprobs", "21", "20"]),
        ({"top_q": 1}, ["top_q", "top_p"]),
        ({"stop": "a", "detokenize": False}, ["detokenize"]),
    ],
)
def test_parameters_out_of_range_are_named(fields, words):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)
    for word in words:
        assert word in str(caught.value)
