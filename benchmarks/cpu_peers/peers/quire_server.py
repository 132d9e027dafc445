"""Quire's own server, for the served workload: what HTTP, text and a second process cost beside the engine alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_peers.over_http import Dialect, Server, free_port
from cpu_peers.peers import quire
from cpu_peers.protocol import Request

REQUIREMENTS, BUILD, prepare = quire.REQUIREMENTS, quire.BUILD, quire.prepare
NAME = "measured"


def _body(prompt: Sequence[int], count: int) -> dict[str, Any]:
    return {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": count,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }


class Peer(Server):
    """`quire serve` with the engine's settings as for `quire`."""

    def __init__(self, path: str, request: Request) -> None:
        from quire import __version__

        port, program = free_port(), str(Path(sys.executable).with_name("quire"))
        command = [program, "serve", path, "--port", str(port), "--served-name", NAME, *_flags(request)]
        dialect = Dialect("/v1/completions", _body, _tokens)
        super().__init__(command, port, dialect, quire.vocabulary(path), Path(request.folder) / "server.log")
        self.notes: dict[str, Any] = {"quire": __version__}


def _flags(request: Request) -> list[str]:
    given = {name: value for name, value in quire.settings(request).items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _tokens(event: Mapping[str, Any]) -> list[int]:
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
