"""quire-tiny's data, tokenizer and checkpoint."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire import LLM, SamplingParams
from quire.loader.checkpoint import bundled_folder
from quire.tokenizer import Tokenizer
from tiny.arithmetic import add_steps, subtract_steps
from tiny.data import TASKS, evaluation_set, is_right, training_stream
from tiny.tokenizer import END, MARKERS, answer_ids, prompt_ids, render, train_tokenizer

ASKED = 12
"""Held-out problems per task that the bundled model is asked here; scripts/tiny/evaluate.py asks more."""


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer(bundled_folder())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_satisfy_their_checker(task):
    rng = random.Random(0)
    for _ in range(200):
        sample = task.make(rng)
        assert is_right(sample, sample.answer)
        assert not is_right(sample, sample.answer + "x")
        assert sample.messages[-1]["role"] in ("user", "tool")


def test_the_split_is_disjoint_and_seeded():
    held_out = {(s.task, s.key) for samples in evaluation_set(1, 30).values() for s in samples if s.task != "talk"}
    trained = list(itertools.islice(training_stream(0), 5000))
    assert not held_out & {(s.task, s.key) for s in trained}
    assert trained == list(itertools.islice(training_stream(0), 5000))
    assert all(len(samples) >= 25 for name, samples in evaluation_set(1, 30).items() if name != "talk")


@given(a=st.integers(0, 999), b=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_worked_steps_are_right(a, b):
    a, b = max(a, b), min(a, b)
    digits = [line.split("write ")[1].split(",")[0] for line in add_steps(a, b).splitlines()]
    assert int("".join(reversed(digits))) == a + b
    digits = [line.split("=")[1].split(",")[0] for line in subtract_steps(a, b).splitlines()]
    assert int("".join(reversed(digits))) == a - b


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_every_digit_is_a_token(shipped):
    assert len(shipped.encode("4821")) == 4


def test_template_renders_thinking_tools_and_system(shipped):
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = shipped.render_chat(messages, tools=[tool])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nTools:\n{")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert shipped.render_chat(messages, enable_thinking=True).endswith("<|im_start|>assistant\n")


def test_training_sees_the_shipped_template():
    trained = train_tokenizer(0)
    for sample in itertools.islice(training_stream(3), 50):
        shipped = Tokenizer(bundled_folder())
        assert render(trained, sample) == shipped.render_chat(
            sample.messages, tools=sample.tools, enable_thinking=sample.thinking
        )
        assert prompt_ids(trained, sample) == shipped.encode(render(trained, sample), add_special_tokens=False)
        assert trained.decode(answer_ids(trained, sample)) == sample.answer + END
        break
    assert set(MARKERS) <= set(trained.get_added_vocab())


def test_the_checkpoint_is_small_and_complete():
    folder = bundled_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_the_bundled_model_is_right_in_its_world():
    """Far below what it reaches, so that rounding on another machine cannot fail it; a broken engine does."""
    llm = LLM()
    problems = evaluation_set(5, ASKED)
    samples = [sample for name in ("add2", "sub2", "copy", "tool", "json", "unknown") for sample in problems[name]]
    chats = [llm.get_tokenizer().apply_chat_template(s.messages, tools=s.tools) for s in samples]
    outputs = llm.generate(chats, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
    right = sum(is_right(sample, output.outputs[0].text) for sample, output in zip(samples, outputs, strict=True))
    assert right >= 0.7 * len(samples)
