"""The short way answers what is in order; whatever is not, the framework does, from the same bytes."""

import asyncio
import json

import httpx
import pytest
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from quire_server import app as application
from quire_server.app import create_app
from quire_server.direct import Direct
from quire_server.errors import ApiError
from quire_server.settings import ServerSettings
from quire_server.state import ServerState
from starlette.responses import PlainTextResponse, Response

JSON = "application/json"
GOOD = b'{"prompt": "7, 3", "max_tokens": 4, "seed": 1, "temperature": 0}'


class Body(BaseModel):
    model_config = ConfigDict(strict=True)

    count: int


router = APIRouter()


@router.post("/count")
async def count(request: Request, body: Body) -> Response:
    if body.count < 0:
        raise ApiError(418, "not below zero")
    return PlainTextResponse(f"direct {body.count}")


@router.get("/count")
async def shown(request: Request) -> Response:
    return PlainTextResponse("shown")


async def framework(scope, receive, send):
    """Answers with what it gets of the body."""
    pieces = []
    while True:
        message = await receive()
        pieces.append(message.get("body", message["type"].encode()))
        if not message.get("more_body"):
            break
    await PlainTextResponse(b"framework " + b"|".join(pieces))(scope, receive, send)


def answered(pieces, *, method="POST", path="/count", kind=JSON, gone=False):
    """Status and text of what a request of these pieces gets."""
    sent = []
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = gone
    messages.append({"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [] if kind is None else [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Direct(framework, [router])(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode(errors="replace")


def test_what_is_in_order_is_called_at_once():
    assert answered([b'{"count": 3}']) == (200, "direct 3")
    assert answered([b'{"cou', b'nt": 3', b"}"], kind="Application/JSON; charset=utf-8") == (200, "direct 3")
    status, text = answered([b'{"count": -1}'])
    assert (status, json.loads(text)["error"]["message"]) == (418, "not below zero")


@pytest.mark.parametrize(
    ("pieces", "more", "seen"),
    [
        ([b'{"count": "3"}'], {}, '{"count": "3"}'),
        ([b'{"cou', b'nt": 3.5}'], {}, '{"cou|nt": 3.5}'),
        ([b"{"], {}, "{"),
        ([b"[" * 100_000], {}, "[" * 100_000),
        ([b"\xff"], {}, "\ufffd"),
        ([b"[3]"], {}, "[3]"),
        ([b'{"count": 3}'], {"kind": "text/plain"}, '{"count": 3}'),
        ([b'{"count": 3}'], {"kind": None}, '{"count": 3}'),
        ([b'{"count": 3}'], {"path": "/other"}, '{"count": 3}'),
        ([b'{"count": 3}'], {"method": "GET"}, '{"count": 3}'),
        ([b'{"count": 3}'], {"gone": True}, '{"count": 3}|http.disconnect'),
    ],
)
def test_everything_else_goes_on_as_it_came(pieces, more, seen):
    assert answered(pieces, **more) == (200, f"framework {seen}")


CASES = [
    (GOOD, JSON),
    (GOOD, "application/json; charset=utf-8"),
    (GOOD, "application/vnd.x+json"),
    (GOOD, "text/plain"),
    (GOOD, None),
    (b"", JSON),
    (b"{", JSON),
    (b"[]", JSON),
    (b"null", JSON),
    (b'"prompt"', JSON),
    (b'{"prompt": 3.5}', JSON),
    (b'{"prompt": "x", "temperature": NaN}', JSON),
    (b'{"prompt": "x", "max_tokens": 1e400}', JSON),
    (b'{"prompt": "x", "n": 2, "n": true}', JSON),
    (b'{"prompt": "\\ud800"}', JSON),
    ('{"prompt": "7, 3", "max_tokens": 2, "seed": 1}'.encode("utf-16"), JSON),
    (b'{"prompt": "x", "response_format": {"type": "json_object"}}', JSON),
    (b'{"prompt": "x", "model": "other"}', JSON),
    (b'{"prompt": "x", "max_tokens": 1, "unheard_of": 1}', JSON),
]


def test_both_ways_answer_alike(llm, monkeypatch):
    """Status, body and headers of the server with the short way and of one without it."""

    class Never(Direct):
        async def __call__(self, scope, receive, send):
            await self._app(scope, receive, send)

    state = ServerState(llm, ServerSettings(port=0))
    with_it = create_app(state)
    monkeypatch.setattr(application, "Direct", Never)
    without = create_app(state)

    async def ask(app, content, kind):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"x-request-id": "same"} | ({} if kind is None else {"content-type": kind})
            answer = await client.post("/v1/completions", content=content, headers=headers)
        body = answer.json()
        return answer.status_code, body.pop("id", None) is None, body | {"created": 0}, dict(answer.headers)

    async def main():
        for content, kind in CASES:
            assert await ask(with_it, content, kind) == await ask(without, content, kind), (content, kind)

    asyncio.run(main())
