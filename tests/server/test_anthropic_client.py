"""Anthropic's own client against a running server."""

import asyncio

import anthropic
import httpx
import pytest
from quire_server.anthropic_protocol import CountRequest
from quire_server.jobs import chat_prompt

QUESTION = [{"role": "user", "content": "What is 27+45?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
GREEDY = {"extra_body": {"temperature": 0}}
COMMON = {"model": "quire-tiny", "max_tokens": 100}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as made:
        yield made


def test_a_message(client):
    answer = client.messages.create(**COMMON, messages=QUESTION)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "quire-tiny")
    assert [(block.type, block.text) for block in answer.content] == [("text", "72")]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.output_tokens == 3
    assert answer.id.startswith("msg_")
    assert answer._request_id
    again = client.messages.create(**COMMON, messages=QUESTION)
    assert again.usage.cache_read_input_tokens > 0
    prompt = client.messages.count_tokens(model="quire-tiny", messages=QUESTION).input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == prompt


def test_a_stream_adds_up_to_the_whole(client):
    whole = client.messages.create(**COMMON, messages=QUESTION, thinking={"type": "adaptive"}, **GREEDY)
    with client.messages.stream(**COMMON, messages=QUESTION, thinking={"type": "adaptive"}, **GREEDY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert "7" in whole.content[0].thinking
    assert [block.text for block in final.content[1:]] == [block.text for block in whole.content[1:]]
    assert final.content[0].thinking == whole.content[0].thinking
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_names_of_events_and_their_order(server):
    body = COMMON | {"messages": QUESTION, "stream": True}
    text = httpx.post(f"{server}/v1/messages", json=body).text
    events = [part.split("\n")[0].removeprefix("event: ") for part in text.strip().split("\n\n")]
    assert events[:3] == ["message_start", "ping", "content_block_start"]
    assert set(events[3:-3]) == {"content_block_delta"}
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_tools_there_and_back(client):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.messages.create(**COMMON, messages=question, tools=[WEATHER], **GREEDY)
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert (answer.stop_reason, use.name, use.input) == ("tool_use", "get_weather", {"city": "Paris"})
    with client.messages.stream(**COMMON, messages=question, tools=[WEATHER], **GREEDY) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert (streamed.name, streamed.input) == (use.name, use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [*question, {"role": "assistant", "content": [use.to_dict()]}, {"role": "user", "content": [result]}]
    assert client.messages.create(**COMMON, messages=turns, tools=[WEATHER]).content
    hidden = client.messages.create(**COMMON, messages=question, tools=[WEATHER], tool_choice={"type": "none"})
    assert all(block.type == "text" for block in hidden.content)


def test_ends_and_limits(client):
    copy = [{"role": "user", "content": "Repeat: alpha beta gamma"}]
    assert client.messages.create(model="quire-tiny", max_tokens=2, messages=copy).stop_reason == "max_tokens"
    stopped = client.messages.create(**COMMON, messages=copy, stop_sequences=["beta"], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "beta")
    assert stopped.content[0].text == "alpha "


def test_a_begun_answer_is_continued(client, llm):
    """The prompt ends with the assistant's own words, so that the model goes on with them."""
    begun = [*QUESTION, {"role": "assistant", "content": "The answer"}]
    prompt = chat_prompt(llm, CountRequest(model="quire-tiny", messages=begun).as_chat())
    assert llm.tokenizer.decode(prompt.token_ids).endswith("assistant\nThe answer")
    assert client.messages.create(**COMMON, messages=begun).role == "assistant"


def test_system_texts_count(client):
    plain = client.messages.count_tokens(model="quire-tiny", messages=QUESTION).input_tokens
    blocks = [
        {"type": "text", "text": "Be "},
        {"type": "text", "text": "brief.", "cache_control": {"type": "ephemeral"}},
    ]
    for system in ("Be brief.", blocks):
        more = client.messages.count_tokens(model="quire-tiny", messages=QUESTION, system=system).input_tokens
        assert more > plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "claude-x"}, "does not exist"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 10**6}, "maximum context length"),
        ({"temperature": 1.5}, "temperature is 1.5"),
        ({"tools": [WEATHER], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]}, "belongs"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"stop_sequences": ["x"] * 99}, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_anthropics(server, change, words, stream):
    body = COMMON | {"messages": QUESTION, "stream": stream} | change
    answer = httpx.post(f"{server}/v1/messages", json=body)
    assert answer.status_code in (400, 404)
    error = answer.json()
    assert (error["type"], set(error["error"])) == ("error", {"type", "message"})
    assert error["error"]["type"] == ("not_found_error" if answer.status_code == 404 else "invalid_request_error")
    assert words in error["error"]["message"]


def test_what_has_no_effect_is_named(server):
    body = COMMON | {"messages": QUESTION, "thinking": {"type": "enabled", "budget_tokens": 1024}, "novelty": 1}
    answer = httpx.post(f"{server}/v1/messages", json=body | {"metadata": {"user_id": "u"}})
    assert answer.status_code == 200
    assert answer.headers["x-quire-ignored-fields"] == "novelty, thinking.budget_tokens"


def test_the_asynchronous_client(server):
    async def main():
        async with anthropic.AsyncAnthropic(base_url=server, api_key="none", max_retries=0) as client:
            whole, streamed = await asyncio.gather(
                client.messages.create(**COMMON, messages=QUESTION), _streamed(client)
            )
            return whole.content[0].text, streamed

    async def _streamed(client):
        async with client.messages.stream(**COMMON, messages=QUESTION) as stream:
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main()) == ("72", "72")
