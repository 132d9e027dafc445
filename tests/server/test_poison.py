"""Three hundred requests that mean harm, among good ones: each is answered by one 4xx, and the good ones do not notice.

The kinds are those of published advisories on inference servers: absurd numbers, absurd lengths, other types,
broken JSON and text, ids outside the vocabulary, templates' own fields, nested and repeated structures.
"""

import asyncio
import json
import random

import httpx
import pytest
from quire import AsyncLLM

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "hello"}]
NESTED = "[" * 5000 + "]" * 5000


def poisons():
    """(path, body as JSON or raw bytes)."""
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        for value in (-1e308, 1e308, "NaN", [], {}, True, "1"):
            yield CHAT, {"messages": HELLO, field: value}
    counts = ("max_tokens", "n", "seed", "top_k", "min_tokens", "top_logprobs", "truncate_prompt_tokens", "priority")
    for field in counts:
        for value in (-(2**70), 2**70, 1.5, "7", [1]):
            yield CHAT, {"messages": HELLO, field: value}
    for ids in ([-1], [10**9], [2**70], [1.5], [None], [[1], [-3]], [True], []):
        yield TEXT, {"prompt": ids}
    for prompt in ("", 7, None, {"a": 1}, [""], [[]], ["x"] * 5000, "long " * 50_000):
        yield TEXT, {"prompt": prompt}
    for raw in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"{" * 9999,
    ):
        yield TEXT, raw
    yield TEXT, f'{{"prompt": {NESTED}}}'.encode()
    yield TEXT, f'{{"prompt": "x", "logit_bias": {NESTED}}}'.encode()
    for messages in (None, [], {}, "x", [[]], [{}], [{"role": "user"}] * 5000, [{"role": "root", "content": "x"}]):
        yield CHAT, {"messages": messages}
    for content in (7, {"a": 1}, [{"type": "image_url"}], [{"type": "text", "text": 7}], [None]):
        yield CHAT, {"messages": [{"role": "user", "content": content}]}
    for arguments in ({"tokenize": False}, {"chat_template": "{{ 1/0 }}"}, {"messages": []}, {"tools": []}, [], "x"):
        yield CHAT, {"messages": HELLO, "chat_template_kwargs": arguments}
    for template in ("{{ cycler.__init__.__globals__ }}", "{% for i in range(10**9) %}{% endfor %}"):
        yield CHAT, {"messages": HELLO, "chat_template": template}
    for bias in ({"-1": 1}, {"x": 1}, {"1": "y"}, {"1": 1e999}, {str(i): 1 for i in range(5000)}, []):
        yield CHAT, {"messages": HELLO, "logit_bias": bias}
    for stop in ("", [""], ["x"] * 100, ["x" * 10_000], 7, [7], {}):
        yield CHAT, {"messages": HELLO, "stop": stop}
    for tools in ({}, [7], [{"type": "shell"}], [{"type": "function"}], [{"type": "function", "function": {}}] * 500):
        yield CHAT, {"messages": HELLO, "tools": tools}
    for more in (
        {"response_format": {"type": "json_schema", "json_schema": {"$ref": "#"}}},
        {"guided_regex": "(a+)+$"},
        {"stream_options": {"include_usage": True}},
        {"model": "../../etc/passwd"},
        {"model": "x" * 100_000},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [10**9]},
        {"stop_token_ids": [10**9] * 5000},
        {"cache_salt": ""},
        {"cache_salt": "x" * 10_000},
        {"prompt_logprobs": 10**6},
        {"priority": "first"},
        {"extra_args": 7, "n": 0},
    ):
        yield CHAT, {"messages": HELLO} | more


ODD = (None, 7, {}, [7], [[]], [{}], [{"type": []}], [{"type": 7}], [{"type": "text"}], [{"type": "text", "text": 7}])
"""Contents of the wrong shape, to be put wherever a content may stand."""


def other_apis():
    """The same for the APIs that nest more."""
    messages = {"model": "quire-tiny", "max_tokens": 5}
    for content in (*ODD, [{"type": "input_text", "text": "x" * 9}, 3], [{"type": [], "text": "x"}]):
        for role in ("user", "assistant", "root", None, []):
            yield RESPONSES, {"input": [{"role": role, "content": content}]}
            yield MESSAGES, messages | {"messages": [{"role": role, "content": content}]}
        yield RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": content}]}
        yield RESPONSES, {"input": [{"type": "reasoning", "content": content if content else 7}]}
        result = {"type": "tool_result", "tool_use_id": "t", "content": content if content else 7}
        yield MESSAGES, messages | {"messages": [{"role": "user", "content": [result]}]}
        yield COUNT, {"model": "quire-tiny", "messages": [{"role": "user", "content": [result]}]}
    for kind in ([], {}, 7, "item_reference", "computer_call"):
        yield RESPONSES, {"input": [{"type": kind, "call_id": "c"}]}
        yield MESSAGES, messages | {"messages": [{"role": "user", "content": [{"type": kind}]}]}
    for field in ("name", "arguments", "call_id"):
        call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
        yield RESPONSES, {"input": [call | {field: 7}]}
    yield RESPONSES, {"input": [{"role": "user", "content": "x"}] * 5000}
    yield MESSAGES, messages | {"messages": [{"role": "user", "content": "x"}] * 5000}
    for tool in (7, [], {}, {"name": "f"}, {"name": 7, "input_schema": {}}, {"name": "f", "input_schema": 7}):
        yield MESSAGES, messages | {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
        yield RESPONSES, {"input": "x", "tools": [tool]}
    for more in ({"max_tokens": 2**70}, {"top_k": 2**70}, {"system": 7}, {"system": [{}]}, {"thinking": "yes"}):
        yield MESSAGES, messages | {"messages": [{"role": "user", "content": "x"}]} | more
    for more in ({"reasoning": 7}, {"metadata": {"a": 1}}, {"instructions": 7}, {"max_output_tokens": 2**70}):
        yield RESPONSES, {"input": "x"} | more


@pytest.mark.parametrize(("path", "body"), list(other_apis()), ids=lambda value: str(value)[:60])
def test_every_shape_of_the_other_apis_is_answered_by_a_4xx(http, path, body):
    answer = http.post(path, json=body)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


@pytest.fixture(scope="module", params=[False, True], ids=["here", "child"])
def served(request):
    llm = AsyncLLM(num_kv_blocks=300, dtype="float32", process=request.param, deterministic=True)
    yield llm
    llm.shutdown()


def test_poison_among_good_requests(serve, served):
    kinds = list(poisons())
    assert len({repr(kind)[:200] for kind in kinds}) > 140
    harmful = (kinds * 3)[:300]
    random.Random(3).shuffle(harmful)
    good = {"prompt": "Repeat: one two three", "max_tokens": 30, "temperature": 0.8, "seed": 9, "ignore_eos": True}

    async def main(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            alone = (await client.post(TEXT, json=good)).json()["choices"]

            async def poison(path, body):
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                return body, await client.post(path, content=raw, headers={"Content-Type": "application/json"})

            async def fine():
                return (await client.post(TEXT, json=good)).json()["choices"]

            results = await asyncio.gather(*(poison(*item) for item in harmful), *(fine() for _ in range(10)))
            return alone, results[:300], results[300:]

    with serve(served) as (url, state, _):
        process = getattr(served.engine, "process_id", None)
        alone, refused, answered = asyncio.run(main(url))
        for body, answer in refused:
            assert 400 <= answer.status_code < 500, (str(body)[:200], answer.status_code, answer.text[:300])
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(answer.content) < 2000
            assert "Traceback" not in answer.text
        assert answered == [alone] * 10
        assert getattr(served.engine, "process_id", None) == process
        assert state.admission.num_requests == 0
        assert httpx.get(f"{url}/health").status_code == 200
