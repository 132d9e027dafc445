"""The tasks of quire-tiny: answers are right by their own checkers, and held-out problems stay out of training."""

import dataclasses
import itertools
import random

import pytest
from tiny.arithmetic import add_steps, subtract_steps
from tiny.data import PRACTICE, TASKS, evaluation_set, is_right, training_stream
from tiny.recall import recall_turns
from tiny.sample import HELD_OUT_EVERY, Sample
from tiny.structured import tool_call

SHARED = [task for task in TASKS if task.held_out]


def made(task, count, seed=0):
    rng = random.Random(seed)
    return [task.make(rng) for _ in range(count)]


@pytest.mark.parametrize("task", [*TASKS, *PRACTICE[-2:]], ids=lambda task: f"{task.name}-{task.share:g}")
def test_a_tasks_own_answer_passes_its_check_and_another_does_not(task):
    for sample in made(task, 300):
        assert is_right(sample, sample.answer)
        assert not is_right(sample, sample.answer + " or so")
        assert not is_right(sample, "")


@pytest.mark.parametrize("task", SHARED, ids=lambda task: task.name)
def test_about_one_problem_in_twenty_is_held_out(task):
    samples = {sample.key: sample for sample in made(task, 6000)}
    share = sum(sample.is_held_out for sample in samples.values()) / len(samples)
    assert 0.5 / HELD_OUT_EVERY < share < 2 / HELD_OUT_EVERY


@pytest.mark.parametrize("tasks", [TASKS, PRACTICE], ids=["main", "practice"])
def test_training_never_meets_a_held_out_problem(tasks):
    asked = {(sample.task, sample.key) for name, of in evaluation_set(1, 60).items() if name != "talk" for sample in of}
    assert len(asked) > 500
    trained = {(sample.task, sample.key) for sample in itertools.islice(training_stream(0, tasks), 15_000)}
    assert not asked & trained


def test_a_practice_conversation_asks_no_held_out_question():
    rng = random.Random(0)
    for sample in (recall_turns(rng) for _ in range(500)):
        if not sample.learn_turns:
            continue
        text = sample.messages[0]["content"].splitlines()[0]
        answers = [message["content"] for message in sample.messages if message["role"] == "assistant"]
        assert all(answer in text for answer in [*answers, sample.answer])
        assert not sample.is_held_out


def test_the_split_does_not_depend_on_the_wording():
    sample = made(TASKS[0], 1)[0]
    other = dataclasses.replace(sample, messages=[{"role": "user", "content": "put differently"}])
    assert other.is_held_out == sample.is_held_out


def test_streams_and_evaluations_are_seeded():
    first, again, other = (list(itertools.islice(training_stream(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other
    assert evaluation_set(5, 3) == evaluation_set(5, 3) != evaluation_set(6, 3)


def test_an_evaluation_holds_as_many_distinct_problems_as_asked_for():
    for name, samples in evaluation_set(1, 25).items():
        assert len({sample.key for sample in samples}) == len(samples) == 25, name


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (27, 45, "ones: 7+5=12, write 2, carry 1\ntens: 2+4+1=7, write 7, carry 0"),
        (95, 7, "ones: 5+7=12, write 2, carry 1\ntens: 9+0+1=10, write 0, carry 1\nhundreds: write 1"),
        (0, 0, "ones: 0+0=0, write 0, carry 0"),
    ],
)
def test_worked_steps_of_an_addition(a, b, wanted):
    assert add_steps(a, b) == wanted


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_digits_written_in_worked_steps_are_the_result(digits):
    rng = random.Random(digits)
    for _ in range(300):
        low, high = sorted(rng.randrange(10**digits) for _ in range(2))
        written = [line.split("write ")[1][0] for line in add_steps(low, high).splitlines()]
        assert int("".join(reversed(written))) == low + high
        left = [line.split("=")[1].split(",")[0] for line in subtract_steps(high, low).splitlines()]
        assert int("".join(reversed(left))) == high - low
        assert subtract_steps(high, low).endswith("borrow 0")


def test_the_check_looks_behind_the_reasoning_and_inside_the_tool_call():
    sum_ = Sample("add2", "1,2", (), "3", "3")
    assert is_right(sum_, "<think>\nones: 1+2=3\n</think>\n\n3")
    assert not is_right(sum_, "3\n</think>\n\n4")
    rng = random.Random(0)
    call = next(s for s in (tool_call(rng) for _ in range(50)) if s.answer.startswith("<tool_call>"))
    assert is_right(call, call.expected)
    assert not is_right(call, call.expected.replace('"name"', '"nome"'))


def test_no_call_is_right_when_no_tool_on_offer_fits():
    rng = random.Random(0)
    for sample in (tool_call(rng, no_tool_share=1.0) for _ in range(100)):
        assert sample.expected == "I have no tool for that."
        assert not is_right(sample, '<tool_call>\n{"name": "get_time", "arguments": {"city": "Bern"}}\n</tool_call>')
