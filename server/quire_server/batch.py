"""`quire batch`: OpenAI batch lines in, batch results out. A run that was ended is taken up where it stopped.

https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from quire import ConfigError, QuireError
from tqdm import tqdm

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
TIMEOUT = 3600.0
"""Seconds that one request may take; a full queue is part of it."""
PAUSE = 0.5
"""Seconds until a request that was refused for lack of room is sent again."""
LOST = "connection_error"
"""Code of a result that a later run tries to better."""
ATTEMPTS = 5
"""How often a request is sent to a server that cannot be reached."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: a request, or what is wrong with the line."""

    number: int
    custom_id: str
    path: str = ""
    body: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Lines that were answered with success, that failed, and that had been answered before."""

    succeeded: int
    failed: int
    skipped: int


def read_lines(source: Path) -> list[Line]:
    """All lines. Raises ConfigError if the file cannot be read."""
    try:
        # Not splitlines: JSON may hold the other characters that end lines for Python.
        texts = source.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {source}: {error}") from error
    lines, seen = [], set()
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        line = _line(number, text)
        if line.custom_id in seen:
            line = Line(number, f"line-{number}", problem=f"custom_id {line.custom_id!r} stands on an earlier line too")
        if not line.problem:
            seen.add(line.custom_id)
        lines.append(line)
    return lines


def _line(number: int, text: str) -> Line:
    unnamed = f"line-{number}"
    try:
        given = json.loads(text)
        json.dumps(given, ensure_ascii=False, allow_nan=False).encode()  # half a character, NaN: it could not be sent
    except (ValueError, RecursionError) as error:
        return Line(number, unnamed, problem=f"the line is no JSON: {error}")
    if not isinstance(given, dict) or not isinstance(given.get("custom_id"), str):
        return Line(number, unnamed, problem="the line must be an object with a custom_id, which is a text")
    custom_id = given["custom_id"]
    if given.get("method", "POST") != "POST":
        return Line(number, custom_id, problem=f"method is {given['method']!r}; it must be 'POST'")
    if given.get("url") not in PATHS:
        return Line(number, custom_id, problem=f"url is {given.get('url')!r}; it must be one of {', '.join(PATHS)}")
    body = given.get("body")
    if not isinstance(body, dict):
        return Line(number, custom_id, problem="body must be an object")
    if body.get("stream"):
        return Line(number, custom_id, problem="body.stream is true; a batch's answers are whole")
    return Line(number, custom_id, given["url"], body)


def answered(target: Path) -> set[str]:
    """custom_ids of the results that a file holds.

    What a new run can better is taken out of the file: a last line that was cut, and results of
    requests that no server answered. Raises ConfigError for a file that holds something else.
    """
    if not target.exists():
        return set()
    data = target.read_bytes()
    kept, found = [], set()
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            result = json.loads(text)
            custom_id, error = result["custom_id"], result["error"]
        except (ValueError, KeyError, TypeError) as problem:
            remedy = "name another file; this one is no result of a batch"
            raise ConfigError(f"{target} line {number} is no result of a batch", remedy=remedy) from problem
        status = (result.get("response") or {}).get("status_code", 0)
        if (error or {}).get("code") != LOST and status < 500:
            kept.append(text + b"\n")
            found.add(custom_id)
    if b"".join(kept) != data:
        target.write_bytes(b"".join(kept))
    return found


async def run_batch(client: httpx.AsyncClient, lines: list[Line], target: Path, concurrency: int) -> Summary:
    """Answer the lines that have no answer yet; each result is written as soon as it is there.

    Args:
        client: of the server. lines: all of them. target: results, appended. concurrency: requests at a time.
    """
    done = answered(target)
    waiting = iter([line for line in lines if line.custom_id not in done])
    counts = {True: 0, False: 0}
    with target.open("a", encoding="utf-8") as file, tqdm(total=len(lines), initial=len(done), unit="request") as bar:

        async def work(rest: Iterator[Line]) -> None:
            for line in rest:
                result = await _result(client, line)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
                counts[result["error"] is None and result["response"]["status_code"] == 200] += 1
                bar.update()

        await asyncio.gather(*(work(waiting) for _ in range(concurrency)))
    return Summary(counts[True], counts[False], len(lines) - counts[True] - counts[False])


async def _result(client: httpx.AsyncClient, line: Line) -> dict[str, Any]:
    result: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if line.problem:
        return result | {"response": None, "error": {"code": "invalid_line", "message": line.problem}}
    try:
        answer = await _sent(client, line)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:  # no answer, or one of something that is no server of ours
        message = f"{type(error).__name__}: {error}"
        return result | {"response": None, "error": {"code": LOST, "message": message}}
    response = {
        "status_code": answer.status_code,
        "request_id": answer.headers.get("x-request-id", ""),
        "body": body,
    }
    return result | {"response": response, "error": None}


async def _sent(client: httpx.AsyncClient, line: Line) -> httpx.Response:
    """The answer; a full queue is waited for, a server that cannot be reached is tried a few times."""
    attempts, deadline = 0, time.monotonic() + TIMEOUT
    while True:
        try:
            answer = await client.post(line.path, json=line.body)
        except httpx.TransportError:
            attempts += 1
            if attempts == ATTEMPTS:
                raise
            await asyncio.sleep(PAUSE * 2**attempts)
            continue
        if answer.status_code != 429 or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(PAUSE)


@asynccontextmanager
async def client_for(app_or_url: Any, key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a running server, or of an application in this process."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if isinstance(app_or_url, str):
        client = httpx.AsyncClient(base_url=app_or_url, headers=headers, timeout=TIMEOUT)
    else:
        transport = httpx.ASGITransport(app=app_or_url)
        client = httpx.AsyncClient(transport=transport, base_url="http://batch", headers=headers, timeout=TIMEOUT)
    async with client:
        yield client


def check_reachable(url: str) -> str:
    """The URL without what a batch's lines bring themselves. Raises QuireError if nobody answers there."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        httpx.get(f"{base}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise QuireError(f"no server answers at {base}: {error}", remedy="start one with `quire serve`") from error
    return base
