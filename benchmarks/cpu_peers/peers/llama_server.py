"""llama.cpp's own server, for the served workload: built from the sources that llama-cpp-python brings along."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cpu_peers.over_http import Dialect, Server, free_port
from cpu_peers.peers import llama_cpp
from cpu_peers.peers.quire import vocabulary
from cpu_peers.protocol import Request, Unavailable
from cpu_peers.workload import Point, capacity

REQUIREMENTS: tuple[str, ...] = ("cmake", "ninja", "gguf", "numpy")
BUILD: Mapping[str, str] = {}
PACKAGE = "llama-cpp-python"
PROGRAMS = ("llama-server", "llama-quantize")
OFF = ("CURL", "OPENSSL", "BUILD_UI", "BUILD_TESTS", "BUILD_EXAMPLES")
"""What llama.cpp calls LLAMA_... and is not needed: a network of its own, pages, and what surrounds the programs."""


def programs() -> Path:
    """The folder of llama.cpp's programs, built for this machine if they are missing, which takes some minutes.

    Raises:
        Unavailable: it does not build; the whole output is in `llama.cpp.log` beside it.
    """
    folder = Path(sys.prefix) / "llama.cpp"
    if not folder.exists():
        log_file = folder.with_name("llama.cpp.log")
        # On the same file system, so that what is built can be moved.
        with log_file.open("w") as log, tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
            built = _build(Path(scratch), log)
            partial = folder.with_name("llama.cpp.partial")
            partial.mkdir(exist_ok=True)
            for name in PROGRAMS:
                (built / name).replace(partial / name)
            partial.rename(folder)
    return folder


def _build(scratch: Path, log: IO[str]) -> Path:
    """Download the sources, and make the programs of them."""

    def run(*command: str) -> None:
        if subprocess.run(command, cwd=scratch, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise Unavailable(f"{Path(command[0]).name} of llama.cpp's server failed: see llama.cpp.log")

    tools = Path(sys.executable).parent
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, PACKAGE)
    [archive] = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(scratch, filter="data")
    [tree] = scratch.glob("*/vendor/llama.cpp")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
    options += [f"-DLLAMA_{name}=OFF" for name in OFF]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    run(str(tools / "cmake"), "-G", "Ninja", ninja, "-S", str(tree), "-B", "build", *options)
    run(str(tools / "ninja"), "-C", "build", *PROGRAMS)
    return scratch / "build" / "bin"


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """The same files as for llama.cpp's library."""
    return llama_cpp.converted(checkpoint, folder, precision, _quantize)


def _quantize(source: Path, target: Path) -> None:
    subprocess.run([programs() / "llama-quantize", source, target, "Q4_0"], capture_output=True, check=True)


def _body(prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Greedy by a sampler that looks for one token: its own chain for temperature 0 takes 1.3 ms longer a token."""
    return {
        "prompt": list(prompt),
        "n_predict": count,
        "ignore_eos": True,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
    }


class Peer(Server):
    """A slot for each request that may run at once; batches and KV cache as are its defaults."""

    def __init__(self, path: str, request: Request) -> None:
        need = capacity(map(Point.parse, request.points))
        context = need.sequences * (-(-need.length // 256) * 256)
        port, server = free_port(), str(programs() / "llama-server")
        limits = ["--ctx-size", context, "--parallel", need.sequences, "--threads", request.threads, "--cache-ram", 0]
        command = [server, "--model", path, "--port", port, *limits]
        vocab = vocabulary(request.checkpoint)
        dialect = Dialect("/completion", _body, lambda event: event["tokens"])
        super().__init__([str(word) for word in command], port, dialect, vocab, Path(request.folder) / "server.log")
        version = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stderr
        self.notes: dict[str, Any] = {"llama-server": version.splitlines()[0]}
