"""Virtual environments of the peers, made once under the cache folder. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO

from cpu_peers.protocol import Unavailable

SOURCES = Path(__file__).parents[1]
"""The folder from which `cpu_peers` is imported."""


def default_cache() -> Path:
    """A folder in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quire" / "cpu_peers"


def interpreter(
    name: str, requirements: Sequence[str], build: Mapping[str, str], cache: Path, unwanted: Sequence[str] = ()
) -> str:
    """The peer's Python, with its requirements installed; without requirements the one that runs this.

    A folder that is there and complete is used as it is. torch is held at this environment's version, so that peers
    built on it do not differ by it.

    Args:
        unwanted: dependencies that are taken out again.

    Raises:
        Unavailable: pip did not succeed; the whole output is in `NAME.log` beside the environment.
    """
    if not requirements:
        return sys.executable
    folder = cache / "env" / name
    python, done = str(folder / "bin" / "python"), folder / "installed.json"
    if done.exists() and json.loads(done.read_text()) == list(requirements):
        return python
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    held = folder / "constraints.txt"
    held.write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        status = _pip(python, ["install", "--constraint", str(held), *requirements], build, output)
        if unwanted and not status:
            status = _pip(python, ["uninstall", "--yes", *unwanted], {}, output)
    if status:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip ended with status {status}: {(last or ['see its log'])[-1][:200]}")
    done.write_text(json.dumps(list(requirements)))
    return python


def _pip(python: str, arguments: Sequence[str], build: Mapping[str, str], output: IO[str]) -> int:
    command = [python, "-m", "pip", *arguments]
    done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | build, check=False)
    return done.returncode


def surroundings(threads: int) -> dict[str, str]:
    """Environment variables of a worker: how many threads, and no model hub."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
