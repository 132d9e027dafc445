"""The parsers that ship, and how one is chosen."""

import pytest
from quire.contract.parsing import ParserInit
from quire.parsers.auto import select_parser
from quire.parsers.plain import PlainParser
from quire.parsers.qwen import QwenParser
from quire.registry import build_host
from quire.testing.output_parser import OutputParserConformance, join, parse

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


class TestQwen(OutputParserConformance):
    samples = QwenParser.conformance["samples"]

    @pytest.fixture
    def parser_class(self):
        return QwenParser


class TestPlain(OutputParserConformance):
    samples = PlainParser.conformance["samples"]

    @pytest.fixture
    def parser_class(self):
        return PlainParser


def events(text, **init):
    return join(parse(QwenParser(ParserInit(**init)), list(text)))


def test_reasoning_then_answer():
    assert events("<think>\nsteps\n</think>\n\n12") == [("reasoning", "", "steps"), ("text", "", "12")]


def test_reasoning_that_the_prompt_opened():
    assert events("steps</think>12", in_reasoning=True) == [("reasoning", "", "steps"), ("text", "", "12")]


def test_calls_and_text_around_them():
    assert events(f"Wait. {CALL}") == [
        ("text", "", "Wait."),
        ("call", "0", "add"),
        ("arguments", "0", '{"a": 1, "b": [2]}'),
    ]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "x", "arguments": {"a": NaN}}',
        '{"name": "x", "arguments": {"a": -Infinity}}',
        '{"name": "x", "arguments": {"a": 1e999}}',
        '{"name": "x", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "x", "arguments": [1]}',
        '{"name": "x", "arguments": "[1]"}',
        '{"name": "x", "arguments": ' + '{"a":' * 100_000,
    ],
    ids=lambda body: body[:40],
)
def test_what_json_cannot_say_is_no_call(body):
    text = f"<tool_call>{body}</tool_call>"
    assert join(parse(QwenParser(ParserInit()), [text])) == [("text", "", text)]


def test_space_around_what_is_no_call_stays():
    text = "Write <tool_call> first,\n\nthen </tool_call> to end. Or <tool_call>"
    assert events(text) == [("text", "", text)]


def test_broken_calls_are_text():
    assert events("<tool_call>{oops</tool_call>!") == [("text", "", "<tool_call>{oops</tool_call>!")]
    assert events("<tool_call>{oops") == [("text", "", "<tool_call>{oops")]


@pytest.mark.parametrize(
    ("template", "wanted", "name"),
    [
        ("...<think>...", "auto", "qwen"),
        ("plain", "auto", "plain"),
        (None, "auto", "plain"),
        ("<think>", "plain", "plain"),
    ],
)
def test_choice_by_template(template, wanted, name):
    assert select_parser(build_host(), wanted, template).provider.name == name
