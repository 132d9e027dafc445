"""Renders chat templates, one JSON line after another. Run as a script: it must not load the engine and torch.

A template comes with the checkpoint and runs on what users send, so it may be slow, or huge, by malice or by
accident. Here it can be killed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

GRACE = 2
"""Seconds behind its time-out after which a rendering ends itself, should nobody be left to end it."""


def render(job: Mapping[str, Any]) -> str:
    """The conversation `job["messages"]` as `job["template"]` writes it, by the rules of transformers.

    Raises:
        Exception: whatever the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[job["messages"]],
        tools=job["tools"],
        chat_template=job["template"],
        add_generation_prompt=job["add_generation_prompt"],
        continue_final_message=job["continue_final_message"],
        **job["arguments"],
    )
    return str(texts[0])


def answer(job: Mapping[str, Any], max_characters: int) -> dict[str, str]:
    """{"text": ...}, or {"error": ...}: why there is none."""
    try:
        text = render(job)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}
    if len(text) > max_characters:
        return {"error": f"it wrote {len(text)} characters, {max_characters} are allowed"}
    return {"text": text}


def serve(jobs: BinaryIO, answers: BinaryIO, timeout: float, max_memory: int, max_characters: int) -> None:
    """Answer until `jobs` ends. The first line out is `{}`: the packages are loaded, and time counts from here."""
    import transformers.utils.chat_template_utils  # noqa: F401

    _limit_memory(max_memory)
    _write(answers, {})
    for line in jobs:
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        _write(answers, answer(json.loads(line), max_characters))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _write(answers: BinaryIO, said: Mapping[str, str]) -> None:
    answers.write(json.dumps(said).encode() + b"\n")
    answers.flush()


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space than is taken now; only Linux tells how much that is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
