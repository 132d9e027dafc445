"""OpenAI's own client against a running server."""

import asyncio
import json

import openai
import pydantic
import pytest

QUESTION = [{"role": "user", "content": "What is 27+45?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "quire-tiny"
    assert client.models.retrieve("quire-tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_chat(client):
    answer = client.chat.completions.create(model="quire-tiny", messages=QUESTION)
    assert answer.choices[0].message.content == "72"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.completion_tokens == 3
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id
    again = client.chat.completions.create(model="quire-tiny", messages=QUESTION)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_streamed_chat(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(model="quire-tiny", messages=QUESTION, stream=True, stream_options=options)
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "72"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)
    plain = list(client.chat.completions.create(model="quire-tiny", messages=QUESTION, stream=True))
    assert all(chunk.choices for chunk in plain)
    running = {"continuous_usage_stats": True}
    told = list(
        client.chat.completions.create(model="quire-tiny", messages=QUESTION, stream=True, stream_options=running)
    )
    counts = [chunk.usage.completion_tokens for chunk in told]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_reasoning_is_told_apart(client):
    answer = client.chat.completions.create(
        model="quire-tiny", messages=QUESTION, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
    )
    message = answer.choices[0].message
    assert message.content == "72"
    assert message.reasoning == message.reasoning_content
    assert "7" in message.reasoning
    assert "think>" not in message.reasoning + message.content
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
    effort = client.chat.completions.create(model="quire-tiny", messages=QUESTION, reasoning_effort="low")
    assert effort.choices[0].message.reasoning == message.reasoning
    silent = client.chat.completions.create(model="quire-tiny", messages=QUESTION, reasoning_effort="none")
    assert not hasattr(silent.choices[0].message, "reasoning")


def test_a_tool_call_and_its_result(client):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(model="quire-tiny", messages=messages, tools=[TOOL]).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert answer.message.content is None
    reply = [*messages, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    said = client.chat.completions.create(model="quire-tiny", messages=reply, tools=[TOOL]).choices[0]
    assert "sunny" in said.message.content
    hidden = client.chat.completions.create(
        model="quire-tiny", messages=messages, tools=[TOOL], tool_choice="none"
    ).choices[0]
    assert hidden.message.tool_calls is None


def test_a_streamed_tool_call_names_id_and_function_once(client):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    stream = client.chat.completions.create(model="quire-tiny", messages=messages, tools=[TOOL], stream=True)
    calls, reasons = [], []
    for chunk in stream:
        calls += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert [call.id is not None for call in calls] == [True] + [False] * (len(calls) - 1)
    assert [call.function.name for call in calls] == ["get_weather"] + [None] * (len(calls) - 1)
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Paris"}
    assert reasons[-1] == "tool_calls"


def test_several_answers_and_seeds(client):
    def ask(**more):
        answer = client.chat.completions.create(
            model="quire-tiny", messages=QUESTION, n=4, temperature=3.0, max_tokens=8, **more
        )
        return [choice.message.content for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert len(set(ask(seed=1))) > 1


def test_log_probabilities(client):
    answer = client.chat.completions.create(model="quire-tiny", messages=QUESTION, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "72"
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)  # greedy
    chunks = list(
        client.chat.completions.create(
            model="quire-tiny", messages=QUESTION, logprobs=True, top_logprobs=3, stream=True
        )
    )
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_stop_strings(client):
    messages = [{"role": "user", "content": "Count from 1 to 9."}]
    whole = client.chat.completions.create(model="quire-tiny", messages=messages).choices[0].message.content
    assert "5" in whole
    cut = client.chat.completions.create(model="quire-tiny", messages=messages, stop="5").choices[0]
    assert cut.message.content == whole[: whole.index("5")]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", "5")
    short = client.chat.completions.create(model="quire-tiny", messages=messages, max_completion_tokens=2).choices[0]
    assert short.finish_reason == "length"


def test_completions_of_texts_and_token_ids(client):
    tokens = client.post("/../tokenize", cast_to=object, body={"prompt": "Ada lives in"})["tokens"]
    as_text = client.completions.create(model="quire-tiny", prompt="Ada lives in", max_tokens=5)
    as_ids = client.completions.create(model="quire-tiny", prompt=tokens, max_tokens=5)
    assert as_text.choices[0].text == as_ids.choices[0].text
    assert as_text.usage.prompt_tokens == len(tokens)
    many = client.completions.create(model="quire-tiny", prompt=["Ada lives in", "Ben has a"], max_tokens=5, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == as_text.choices[0].text
    mixed = client.completions.create(model="quire-tiny", prompt=[tokens, tokens], max_tokens=5)
    assert {choice.text for choice in mixed.choices} == {as_text.choices[0].text}


def test_completions_score_a_prompt(client):
    """As lm-eval asks: echo, log probabilities, nothing generated."""
    prompt = "The code of Ada is 1234."
    answer = client.completions.create(model="quire-tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == prompt
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == prompt
    placed = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert all(prompt[at:].startswith(token) for at, token in placed)
    assert answer.usage.completion_tokens == 0
    longer = client.completions.create(
        model="quire-tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=4, extra_body={"ignore_eos": True}
    ).choices[0]
    assert longer.logprobs.token_logprobs[1 : len(choice.logprobs.tokens)] == pytest.approx(
        choice.logprobs.token_logprobs[1:], abs=1e-3
    )
    assert len(longer.logprobs.tokens) == len(choice.logprobs.tokens) + 4


def test_token_ids_and_truncation(client):
    body = {"return_token_ids": True, "truncate_prompt_tokens": 3}
    answer = client.completions.create(model="quire-tiny", prompt="one two three four", max_tokens=4, extra_body=body)
    choice = answer.choices[0]
    assert len(choice.prompt_token_ids) == answer.usage.prompt_tokens == 3
    assert len(choice.token_ids) == answer.usage.completion_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_streamed_as_they_come_while_their_text_is_held_back(client, chat):
    [letter] = client.post("/../tokenize", cast_to=object, body={"prompt": "a", "add_special_tokens": False})["tokens"]
    held = {"allowed_token_ids": [letter], "ignore_eos": True, "return_token_ids": True, "stop": ["aaaaaaab"]}
    asked = {"model": "quire-tiny", "max_tokens": 4, "stream": True, "extra_body": held}
    if chat:
        chunks = [
            entry for chunk in client.chat.completions.create(messages=QUESTION, **asked) for entry in chunk.choices
        ]
    else:
        chunks = [entry for chunk in client.completions.create(prompt="x", **asked) for entry in chunk.choices]
    texts = [(entry.delta.content if chat else entry.text) or "" for entry in chunks]
    ids = [getattr(entry, "token_ids", None) or [] for entry in chunks]
    assert "".join(texts) == "aaaa"
    assert [each for each in ids if each] == [[letter]] * 4
    assert not any(text for text, each in zip(texts[:-2], ids[:-2], strict=True) if each)


def test_parsing_into_a_type_is_refused_before_anything_runs(client):
    class Sum(pydantic.BaseModel):
        value: int

    with pytest.raises(openai.BadRequestError, match="structured output is not available") as caught:
        client.chat.completions.parse(model="quire-tiny", messages=QUESTION, response_format=Sum)
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="structured output is not available") as caught:
        client.responses.parse(model="quire-tiny", input="What is 27+45?", text_format=Sum)
    assert caught.value.param == "text"
    plain = client.chat.completions.parse(model="quire-tiny", messages=QUESTION)
    assert plain.choices[0].message.content == "72"


def test_going_on_with_a_message(client):
    messages = [*QUESTION, {"role": "assistant", "content": "7"}]
    more = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = client.chat.completions.create(model="quire-tiny", messages=messages, extra_body=more)
    prompt = client.post("/../detokenize", cast_to=object, body={"tokens": answer.prompt_token_ids})["prompt"]
    assert prompt.endswith("7")


def test_many_at_once_answer_as_one_alone(server):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:

            async def ask(a, b):
                messages = [{"role": "user", "content": f"What is {a}+{b}?"}]
                stream = await client.chat.completions.create(model="quire-tiny", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(10 + i, 20 + i) for i in range(40)))

    answers = asyncio.run(all_of_them())
    assert sum(answer == str(30 + 2 * i) for i, answer in enumerate(answers)) >= 39
