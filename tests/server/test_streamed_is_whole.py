"""What a stream tells adds up to the answer that is sent at once: for every API, however the output is cut up."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire import Logprob, OutputDelta, SamplingParams
from quire.contract.parsing import ParserInit
from quire.contract.request import Request
from quire.engine.intake import Submission
from quire.parsers.qwen import QwenParser
from quire_server.chat_encoder import ChatChunks, whole_chat
from quire_server.completion_encoder import CompletionChunks, whole_completion
from quire_server.encoding import Meta, Wants
from quire_server.events import Usage
from quire_server.generation import Job, _Tally, whole
from quire_server.message_encoder import MessageEvents, whole_message
from quire_server.response_encoder import ResponseEvents
from quire_server.sse import Encoder

META = Meta("id_1", 1, "m")
TOOLS = ({"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}})

plain = st.text(st.sampled_from('ab <>{}"\n/ü界'), max_size=12)
call = st.builds(
    lambda name, arguments: f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>",
    st.sampled_from("fg"),
    st.dictionaries(st.text("xyü", max_size=2), st.integers(0, 99) | plain, max_size=2),
)
output = st.builds(
    lambda thought, texts: (f"<think>{thought}</think>" if thought is not None else "") + "".join(texts),
    st.none() | plain,
    st.lists(plain | call, max_size=4),
)


@st.composite
def generations(draw, parsed=True):
    """(job factory, deltas): texts cut anywhere, of several choices, interleaved at will."""
    n = draw(st.integers(1, 3))
    texts = [draw(output if parsed else plain) for _ in range(n)]
    reason = [draw(st.sampled_from([("stop", None), ("stop", "END"), ("length", None)])) for _ in range(n)]
    queues = []
    for index, text in enumerate(texts):
        cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]
        queue = []
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            token = 100 * index + place
            queue.append(
                OutputDelta(
                    "r",
                    index,
                    piece,
                    (token,),
                    ({token: Logprob(-1.0, 1, piece)},),
                    finish_reason=reason[index][0] if last else None,
                    stop_reason=reason[index][1] if last else None,
                    num_prompt_tokens=3,
                    num_cached_tokens=2,
                )
            )
        queues.append(queue)
    deltas = []
    while any(queues):
        chosen = draw(st.sampled_from([index for index, queue in enumerate(queues) if queue]))
        deltas.append(queues[chosen].pop(0))

    def job():
        params = SamplingParams(n=n, logprobs=0)
        sequences = tuple(Request(f"r#{index}", (1, 2, 3), params, 0.0, 9) for index in range(n))
        parsers = [QwenParser(ParserInit(TOOLS)) for _ in range(n)] if parsed else ()
        return Job((Submission("r", None, (1, 2, 3), params, sequences),), parsers)

    return job, deltas


def told_of(job, deltas):
    """Events as they come, those of one delta together."""
    tally = _Tally(job)
    return [*[tally.take(0, delta) for delta in deltas], [tally.usage()]]


def events_of(job, deltas):
    return [event for events in told_of(job, deltas) for event in events]


@pytest.fixture(autouse=True)
def same_call_ids(monkeypatch):
    """Ids of calls are drawn at random."""
    monkeypatch.setattr("uuid.uuid4", lambda: type("Id", (), {"hex": "0" * 32})())


def folded_chat(chunks):
    """What a client of the chat API puts together."""
    choices = {}
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for entry in chunk["choices"]:
            choice = choices.setdefault(
                entry["index"], {"content": "", "reasoning": "", "calls": [], "logprobs": [], "ids": [], "finish": None}
            )
            delta = entry["delta"]
            choice["content"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning") or ""
            choice["ids"] += entry.get("token_ids") or []
            choice["logprobs"] += (entry["logprobs"] or {}).get("content", [])
            for piece in delta.get("tool_calls") or ():
                if "id" in piece:
                    assert piece["index"] == len(choice["calls"])
                    choice["calls"].append([piece["id"], piece["function"]["name"], ""])
                choice["calls"][piece["index"]][2] += piece["function"]["arguments"]
            if entry["finish_reason"] is not None:
                assert choice["finish"] is None
                choice["finish"] = (entry["finish_reason"], entry["stop_reason"])
    return choices, usage


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations())
def test_chat(generation):
    make, deltas = generation
    wants = Wants(logprobs=0, token_ids=True, usage=True)
    job = make()
    events = events_of(job, deltas)
    answer = whole_chat(META, wants, whole(job, events))
    encoder = ChatChunks(META, wants, job.num_choices, job.num_prompt_tokens)
    chunks = [*encoder.begin(), *(chunk for event in events for chunk in encoder.feed(event))]
    choices, usage = folded_chat(chunks)
    assert usage == answer["usage"]
    for index, expected in enumerate(answer["choices"]):
        message, got = expected["message"], choices[index]
        assert got["content"] == (message["content"] or "")
        assert got["reasoning"] == message.get("reasoning", "")
        calls = [[c["id"], c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
        assert got["calls"] == calls
        assert got["finish"] == (expected["finish_reason"], expected["stop_reason"])
        assert got["ids"] == expected["token_ids"]
        assert got["logprobs"] == expected["logprobs"]["content"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations())
def test_cutting_changes_nothing(generation):
    """The same texts in one piece each give the same answer."""
    make, deltas = generation
    joined = {}
    for delta in deltas:
        old = joined.get(delta.index)
        joined[delta.index] = delta if old is None else OutputDelta(
            "r", delta.index, old.text + delta.text, old.token_ids + delta.token_ids, old.logprobs + delta.logprobs,
            finish_reason=delta.finish_reason, stop_reason=delta.stop_reason, num_prompt_tokens=3, num_cached_tokens=2,
        )  # fmt: skip
    one, many = make(), make()
    a = whole_chat(META, Wants(), whole(one, events_of(one, list(joined.values()))))
    b = whole_chat(META, Wants(), whole(many, events_of(many, deltas)))
    assert a["choices"] == b["choices"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations(parsed=False))
def test_completions(generation):
    make, deltas = generation
    job = make()
    events = events_of(job, deltas)

    def encoder(usage):
        wants = Wants(logprobs=0, token_ids=True, usage=usage)
        return CompletionChunks(
            META, wants, job.num_choices, 1, job.num_prompt_tokens, echo=None, only_echo=False, token_text=str
        )

    collected, streamed = encoder(False), encoder(True)
    total = next(event for event in events if isinstance(event, Usage))
    answer = whole_completion([c for event in events for c in collected.feed(event) if c["choices"]], total)
    texts, ends, usage = {}, {}, None
    for chunk in (chunk for event in events for chunk in streamed.feed(event)):
        usage = chunk["usage"] or usage
        for entry in chunk["choices"]:
            texts[entry["index"]] = texts.get(entry["index"], "") + entry["text"]
            ends[entry["index"]] = entry["finish_reason"] or ends.get(entry["index"])
    assert usage == answer["usage"]
    for expected in answer["choices"]:
        assert texts[expected["index"]] == expected["text"]
        assert ends[expected["index"]] == expected["finish_reason"]
        own = [delta for delta in deltas if delta.index == expected["index"]]
        assert expected["text"] == "".join(delta.text for delta in own)
        assert expected["token_ids"] == [token for delta in own for token in delta.token_ids]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations(), generations(parsed=False), st.tuples(*[st.booleans()] * 4), st.booleans())
def test_the_short_way_writes_the_same_bytes(chat, completion, told, only_echo):
    logprobs, token_ids, usage, running = told
    wants = Wants(0 if logprobs else None, token_ids, usage, running)

    def completions(job):
        of = {"echo": None, "only_echo": only_echo, "token_text": str}
        return CompletionChunks(META, wants, job.num_choices, 1, job.num_prompt_tokens, **of)

    def chats(job):
        return ChatChunks(META, wants, job.num_choices, job.num_prompt_tokens)

    for (make, deltas), encoder in ((chat, chats), (completion, completions)):
        job = make()
        quick, slow = encoder(job), encoder(job)
        quick, slow = Encoder(list, quick.feed, quick=quick.quick), Encoder(list, slow.feed)
        for events in told_of(job, deltas):
            assert quick.joined(events) == slow.joined(events)


def single(generation):
    """The generation's first choice alone, for APIs that know no others."""
    make, deltas = generation
    job = make()
    params = SamplingParams(n=1)
    submission = Submission("r", None, (1, 2, 3), params, job.submissions[0].sequences[:1])
    return Job((submission,), job.parsers[:1]), [delta for delta in deltas if delta.index == 0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations())
def test_messages(generation):
    job, deltas = single(generation)
    events = events_of(job, deltas)
    choice = whole(job, events).choices[0]
    encoder = MessageEvents(META, job.num_prompt_tokens)
    chunks = [*encoder.begin(), *(chunk for event in events for chunk in encoder.feed(event))]
    kinds = [chunk["type"] for chunk in chunks if chunk["type"] != "ping"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    opened = [chunk["index"] for chunk in chunks if chunk["type"] == "content_block_start"]
    closed = [chunk["index"] for chunk in chunks if chunk["type"] == "content_block_stop"]
    assert opened == closed == list(range(len(opened)))
    message = whole_message(chunks)
    of = lambda kind, field: "".join(block[field] for block in message["content"] if block["type"] == kind)  # noqa: E731
    assert of("text", "text") == choice.text
    assert of("thinking", "thinking") == choice.reasoning
    uses = [(block["name"], block["input"]) for block in message["content"] if block["type"] == "tool_use"]
    assert uses == [(made.name, json.loads(made.arguments)) for made in choice.tool_calls]
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == 3
    assert (message["stop_reason"] == "tool_use") == (choice.finish.reason == "tool_calls")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations())
def test_responses(generation):
    job, deltas = single(generation)
    events = events_of(job, deltas)
    choice = whole(job, events).choices[0]
    encoder = ResponseEvents(META, {})
    chunks = [*encoder.begin(), *(chunk for event in events for chunk in encoder.feed(event))]
    assert [chunk["sequence_number"] for chunk in chunks] == list(range(len(chunks)))
    final = chunks[-1]["response"]
    items = {}
    for chunk in chunks:
        match chunk["type"].removeprefix("response."):
            case "output_item.added":
                assert chunk["output_index"] == len(items)
                items[chunk["output_index"]] = [chunk["item"]["type"], ""]
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                items[chunk["output_index"]][1] += chunk["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert items[chunk["output_index"]][1] == chunk["text"]
            case "function_call_arguments.done":
                assert items[chunk["output_index"]][1] == chunk["arguments"]
            case "output_item.done":
                assert chunk["item"] == final["output"][chunk["output_index"]]
    told = [
        [item["type"], item.get("arguments", "") or "".join(p["text"] for p in item.get("content", ()))]
        for item in final["output"]
    ]
    assert list(items.values()) == told
    assert "".join(text for kind, text in told if kind == "message") == choice.text
    assert "".join(text for kind, text in told if kind == "reasoning") == choice.reasoning
    assert [text for kind, text in told if kind == "function_call"] == [made.arguments for made in choice.tool_calls]
    assert (final["status"] == "incomplete") == (choice.finish.reason == "length")
