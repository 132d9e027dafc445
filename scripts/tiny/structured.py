"""Answers in JSON, and tool calls."""

from __future__ import annotations

import json
import random
from typing import Any

from tiny.sample import Message, Sample, assistant, user
from tiny.words import CITIES, COLORS, JOBS, NAMES, THINGS

NO_TOOL = "I have no tool for that."


def json_object(rng: random.Random) -> Sample:
    """Put two or three facts into an object."""
    name, age = rng.choice(NAMES), rng.randrange(5, 95)
    city, color, job = rng.choice(CITIES), rng.choice(COLORS), rng.choice(JOBS)
    fields: list[tuple[str, Any, str]] = [
        ("age", age, f"{name} is {age} years old."),
        ("city", city, f"{name} lives in {city}."),
        ("color", color, f"{name} likes {color}."),
        ("job", job, f"{name} is a {job}."),
    ]
    chosen = rng.sample(fields, rng.randrange(1, 4))
    text = " ".join(statement for _, _, statement in chosen)
    keys = ", ".join(["name", *(key for key, _, _ in chosen)])
    answer = json.dumps({"name": name} | {key: value for key, value, _ in chosen})
    wording = rng.choice(
        ("{t} Answer in JSON with {k}.", "{t} Give {k} as JSON.", "{t}\nReturn a JSON object with {k}.",
         "Make JSON with {k}: {t}", "{t} Write this as JSON with the keys {k}.")
    )  # fmt: skip
    return Sample("json", text, [user(wording.format(t=text, k=keys))], answer, answer)


def tool_call(rng: random.Random, no_tool_share: float = 0.15) -> Sample:
    """Tools are offered; call the one that fits, say that none does, or report a tool's answer."""
    tools = rng.sample(_TOOLS, rng.randrange(1, 4))
    offered = [tool[0] for tool in tools]
    if rng.random() < no_tool_share:
        return _no_tool(rng, offered)
    schema, ask = rng.choice(tools)
    name = schema["function"]["name"]
    question, arguments = ask(rng)
    call = json.dumps({"name": name, "arguments": arguments})
    messages: list[Message] = [user(question)]
    if rng.random() < 0.15:
        return _tool_answer(rng, messages, call, offered)
    answer = f"<tool_call>\n{call}\n</tool_call>"
    return Sample("tool", f"{name}{json.dumps(arguments)}", messages, answer, call, tools=offered)


def _no_tool(rng: random.Random, offered: list[dict[str, Any]]) -> Sample:
    names = {schema["function"]["name"] for schema in offered}
    _, ask = rng.choice([tool for tool in _TOOLS if tool[0]["function"]["name"] not in names])
    question, arguments = ask(rng)
    key = f"none{sorted(names)}{json.dumps(arguments)}"
    return Sample("tool", key, [user(question)], NO_TOOL, NO_TOOL, tools=offered)


def _tool_answer(rng: random.Random, messages: list[Message], call: str, offered: list[dict[str, Any]]) -> Sample:
    result = str(rng.choice((rng.randrange(0, 100), rng.choice(("done", "sunny", "rainy", "cloudy", "ok")))))
    parsed = json.loads(call)
    told = {"type": "function", "function": {"name": parsed["name"], "arguments": parsed["arguments"]}}
    turns = [*messages, {**assistant(""), "tool_calls": [told]}, {"role": "tool", "content": result}]
    answer = f"The answer is {result}."
    return Sample("tool", f"{call}{result}", turns, answer, answer, tools=offered)


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _ask_weather(rng: random.Random) -> tuple[str, dict[str, Any]]:
    city = rng.choice(CITIES)
    wordings = ("What is the weather in {c}?", "How is the weather in {c}?", "weather in {c}", "Is it raining in {c}?")
    return rng.choice(wordings).format(c=city), {"city": city}


def _ask_time(rng: random.Random) -> tuple[str, dict[str, Any]]:
    city = rng.choice(CITIES)
    return rng.choice(("What time is it in {c}?", "Time in {c}?", "Tell me the time in {c}.")).format(c=city), {
        "city": city
    }


def _ask_multiply(rng: random.Random) -> tuple[str, dict[str, Any]]:
    a, b = rng.randrange(2, 1000), rng.randrange(2, 1000)
    return rng.choice(("What is {a} times {b}?", "Multiply {a} and {b}.", "{a} * {b}")).format(a=a, b=b), {
        "a": a,
        "b": b,
    }


def _ask_timer(rng: random.Random) -> tuple[str, dict[str, Any]]:
    minutes = rng.randrange(1, 100)
    wordings = ("Set a timer for {m} minutes.", "Start a timer of {m} minutes.", "Wake me in {m} minutes.")
    return rng.choice(wordings).format(m=minutes), {"minutes": minutes}


def _ask_message(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, text = rng.choice(NAMES), " ".join(rng.sample(THINGS, rng.randrange(1, 4)))
    return rng.choice(("Send {n} the message: {t}", "Tell {n}: {t}", "Write to {n}: {t}")).format(n=name, t=text), {
        "to": name,
        "text": text,
    }


def _ask_search(rng: random.Random) -> tuple[str, dict[str, Any]]:
    query = " ".join(rng.sample(THINGS, rng.randrange(1, 3)))
    return rng.choice(("Search for {q}.", "Look up {q}.", "Find {q} on the web.")).format(q=query), {"query": query}


def _ask_light(rng: random.Random) -> tuple[str, dict[str, Any]]:
    color = rng.choice(COLORS)
    return rng.choice(("Make the light {c}.", "Turn the lamp {c}.", "Set the light to {c}.")).format(c=color), {
        "color": color
    }


_TOOLS = (
    (_tool("get_weather", "Weather in a city", city="string"), _ask_weather),
    (_tool("get_time", "Time in a city", city="string"), _ask_time),
    (_tool("multiply", "Multiply two numbers", a="integer", b="integer"), _ask_multiply),
    (_tool("set_timer", "Start a timer", minutes="integer"), _ask_timer),
    (_tool("send_message", "Send a message", to="string", text="string"), _ask_message),
    (_tool("search", "Search the web", query="string"), _ask_search),
    (_tool("set_light", "Color of the light", color="string"), _ask_light),
)
