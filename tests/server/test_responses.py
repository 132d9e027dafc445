"""The responses API by OpenAI's own client."""

import json

import httpx
import openai
import pytest
from quire_server.jobs import chat_prompt
from quire_server.responses_protocol import ResponsesRequest

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, question="What is 27+45?", **fields):
    return client.responses.create(model="quire-tiny", input=question, **fields)


def test_a_response(client):
    answer = ask(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=50)
    assert (answer.status, answer.error) == ("completed", None)
    assert answer.output_text
    assert answer.id.startswith("resp_")
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief.", {"a": "b"}, 50)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert ask(client).output_text == "72"
    assert answer.store is False
    again = ask(client, instructions="Be brief.")
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_reasoning_is_an_item_of_its_own(client):
    answer = ask(client, reasoning={"effort": "low"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert "7" in answer.output[0].content[0].text
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_events_come_in_order_and_add_up(client):
    whole = ask(client, temperature=0)
    events = list(ask(client, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event.type for event in events)) == ORDER
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == next(event.text for event in events if event.type == "response.output_text.done") == "72"
    final = events[-1].response
    assert (final.output_text, final.status) == (whole.output_text, whole.status)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.output == []
    with client.responses.stream(model="quire-tiny", input="What is 27+45?", temperature=0) as stream:
        assert stream.until_done().get_final_response().output_text == "72"


def test_there_is_no_done_line(server):
    text = httpx.post(f"{server}/v1/responses", json={"input": "What is 27+45?", "stream": True}).text
    assert "[DONE]" not in text
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_tools_there_and_back(client):
    question = "What is the weather in Paris?"
    answer = ask(client, question, tools=[TOOL], temperature=0)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Paris"}, "completed")
    events = list(ask(client, question, tools=[TOOL], temperature=0, stream=True))
    pieces = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert (pieces, done.arguments, done.name) == (call.arguments, call.arguments, "get_weather")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items = [{"role": "user", "content": question}, *(item.to_dict() for item in answer.output), output]
    assert ask(client, items, tools=[TOOL]).status == "completed"


def test_an_answer_that_is_cut_says_so(client):
    answer = ask(client, "Repeat: alpha beta gamma", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    assert (
        list(ask(client, "Repeat: alpha beta gamma", max_output_tokens=2, stream=True))[-1].type
        == "response.incomplete"
    )


def test_parts_of_content_and_earlier_answers(client, llm):
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "What is "}, {"type": "input_text", "text": "27+45?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "72", "annotations": []}]},
        {"role": "user", "content": "What is 27+45?"},
    ]
    prompt = chat_prompt(llm, ResponsesRequest(input=items).as_chat())
    text = llm.tokenizer.decode(prompt.token_ids)
    places = [text.index(words) for words in ("Be brief.", "What is 27+45?", "72<")]
    assert places == sorted(places)
    assert ask(client, items).status == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools.[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.[0].content.[0].type",
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.[0].role"),
        ({"input": [{"type": "function_call", "name": "x", "call_id": "c"}]}, "input.[0].arguments"),
        ({"input": [{"role": "user", "content": 3}]}, "input.[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "input"),
        ({"temperature": -1}, "temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused(server, change, param, stream):
    answer = httpx.post(f"{server}/v1/responses", json={"input": "x", "stream": stream} | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
