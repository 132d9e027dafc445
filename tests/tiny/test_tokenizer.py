"""The tokenizer and the chat template that ship with quire-tiny."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.loader.checkpoint import bundled_folder
from tiny.data import PRACTICE, training_stream
from tiny.tokenizer import MARKERS, answer_ids, prompt_ids
from tiny.train import IGNORED, encode
from transformers import AutoTokenizer

TOOL = {
    "type": "function",
    "function": {"name": "get_time", "description": "Time in a city", "parameters": {"type": "object"}},
}
ASKED = [{"role": "user", "content": "What time is it in Oslo?"}]

TOKENIZER = AutoTokenizer.from_pretrained(bundled_folder())


def rendered(messages, **options):
    return TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["don 't , yes .", "  two  spaces\t\n\n", "naïve 日本語 🙂", "\x00\x7f\r"])
def test_texts_that_a_clean_up_would_change_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_every_byte_has_a_token():
    alphabet = {token for token in TOKENIZER.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256
    assert len(TOKENIZER) == 1024


@pytest.mark.parametrize("text", ["1234567890", "27+45", "x9", " 12", "007 - 5"])
def test_a_digit_is_a_token(text):
    tokens = [TOKENIZER.decode([i]) for i in TOKENIZER.encode(text, add_special_tokens=False)]
    digits = [token for token in tokens if any(c.isdigit() for c in token)]
    assert digits == [c for c in text if c.isdigit()]


def test_markers_are_single_tokens_that_stay_in_the_text():
    for marker in MARKERS:
        (token,) = TOKENIZER.encode(marker, add_special_tokens=False)
        assert TOKENIZER.decode([token], skip_special_tokens=True) == marker


def test_without_thinking_the_prompt_closes_an_empty_reasoning():
    assert rendered(ASKED) == (
        "<|im_start|>user\nWhat time is it in Oslo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_with_thinking_the_reasoning_is_left_to_the_model():
    assert rendered(ASKED, enable_thinking=True).endswith("<|im_start|>assistant\n")


def test_tools_stand_in_the_system_message_behind_the_given_one():
    text = rendered([{"role": "system", "content": "Be brief."}, *ASKED], tools=[TOOL])
    assert text.startswith(
        '<|im_start|>system\nBe brief.\n\nTools:\n{"type": "function", "function": {"name": "get_time"'
    )
    assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
def test_a_call_and_its_answer_are_rendered(arguments):
    call = {"type": "function", "function": {"name": "get_time", "arguments": arguments}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "12:00"}]
    text = rendered([*ASKED, *turns], tools=[TOOL])
    assert '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\n12:00\n</tool_response>" in text


def test_earlier_reasoning_is_dropped():
    turns = [*ASKED, {"role": "assistant", "content": "<think>\nwell\n</think>\n\n12:00"}, *ASKED]
    assert "well" not in rendered(turns)
    assert "<|im_start|>assistant\n12:00<|im_end|>" in rendered(turns)


def test_training_learns_answers_and_nothing_else():
    for sample in itertools.islice(training_stream(0, PRACTICE), 200):
        ids, targets = encode(TOKENIZER, sample)
        learnt = [(i, t) for i, t in enumerate(targets) if t != IGNORED]
        assert all(ids[i + 1] == t for i, t in learnt)
        answer = answer_ids(TOKENIZER, sample)
        assert [t for _, t in learnt[-len(answer) :]] == answer
        earlier = (
            "".join(m["content"] for m in sample.messages if m["role"] == "assistant") if sample.learn_turns else ""
        )
        text = TOKENIZER.decode([t for _, t in learnt[: -len(answer)]], skip_special_tokens=True)
        assert text == earlier
        assert len(ids) == len(prompt_ids(TOKENIZER, sample)) + len(answer)
