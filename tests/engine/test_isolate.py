"""A step that fails is taken apart: whoever is to blame ends alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire import LLM, SamplingParams
from quire.contract.request import RowResult, ScheduledRow
from quire.engine.isolate import MAX_CULPRITS, isolate


def rows_of(count):
    return [ScheduledRow(slot, f"r{slot}", 0, 1, (), True) for slot in range(count)]


@given(
    st.integers(2, 64).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=MAX_CULPRITS)))
)
def test_culprits_end_alone_in_few_runs(case):
    count, bad = case
    runs = []

    def run(part):
        runs.append(part)
        if any(row.slot in bad for row in part):
            raise ValueError("poison")
        return tuple(RowResult(row.request_id, row.slot) for row in part)

    rows, error = rows_of(count), ValueError("first")
    if len(bad) == count:
        with pytest.raises(ValueError, match="first"):
            isolate(rows, error, run)
        return
    results = isolate(rows, error, run)
    assert [result.request_id for result in results] == [row.request_id for row in rows]
    for row, result in zip(rows, results, strict=True):
        assert (result.token_id, result.error) == (
            (None, "the step failed: ValueError: poison") if row.slot in bad else (row.slot, None)
        )
    assert len(runs) <= max(1, len(bad)) * (2 * math.ceil(math.log2(count)) + 2)


def test_a_broken_step_is_not_searched_through():
    runs = []

    def run(part):
        runs.append(part)
        raise RuntimeError("all is lost")

    with pytest.raises(RuntimeError, match="first"):
        isolate(rows_of(64), RuntimeError("first"), run)
    assert len(runs) < 30


@pytest.mark.parametrize("allocator", ["paged", "radix"])
def test_one_poisonous_request_among_good_ones(checkpoint, monkeypatch, allocator):
    """The model fails whenever a certain token is in the batch; the others' outputs are what they are without it."""
    llm = LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=200, kv_allocator=allocator, deterministic=True)
    poison, params = 211, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=4, logprobs=1,
                                         repetition_penalty=1.2, bad_token_ids=(211,))  # fmt: skip
    good = [[5, 6, 7 + index] for index in range(9)]
    expected = [output.outputs[0] for output in llm.generate(good, params, use_tqdm=False)]
    model = llm.engine.parts.executor._model
    real, num_failed = model.forward, []

    def forward(input_ids, positions, ctx):
        if (input_ids == poison).any():
            num_failed.append(1)
            raise RuntimeError("device-side assert")
        return real(input_ids, positions, ctx)

    monkeypatch.setattr(model, "forward", forward)
    outputs = [
        output.outputs[0] for output in llm.generate([*good[:4], [5, poison], *good[4:]], params, use_tqdm=False)
    ]
    bad = outputs.pop(4)
    assert (bad.finish_reason, bad.error) == ("error", "the step failed: RuntimeError: device-side assert")
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.logprobs for o in outputs] == [o.logprobs for o in expected]
    assert 1 < len(num_failed) < 12
    assert llm.engine.kv_stats().used == 0
