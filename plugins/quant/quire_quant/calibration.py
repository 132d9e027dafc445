"""Text for calibration, as rows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quire.plugin import ConfigError
from torch import Tensor

PIECE = 1 << 16
"""Characters of plain text that are made tokens at a time."""


def read_rows(path: Path, tokenizer: Any, length: int, count: int) -> Tensor:
    """Token ids int64 [rows, length], at most `count` rows of the file's text, cut one behind the other.

    Args:
        path: plain text, or JSON lines with `text`, or with `messages` and maybe `tools` (a chat, to which the chat
            template is applied).

    Raises:
        ConfigError: the file cannot be read, or holds less than two rows.
    """
    ids: list[int] = []
    for text in _texts(path, tokenizer):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length * count:
            break
    rows = min(len(ids) // length, count)
    if rows < 2:
        raise ConfigError(
            f"{path} holds {len(ids)} tokens; at least two rows of {length} are needed",
            remedy="give more text, or a smaller --sequence-length",
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _texts(path: Path, tokenizer: Any) -> Iterator[str]:
    """Pieces of plain text that end with a line, so that a large file is not read whole; or each line's text."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                while lines := file.readlines(PIECE):
                    yield "".join(lines)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{path}:{number}", tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"calibration: {path} cannot be read: {error}", remedy="name a text or JSON lines file"
        ) from None


def _text_of(line: str, where: str, tokenizer: Any) -> str:
    try:
        entry = json.loads(line)
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        return str(tokenizer.apply_chat_template(entry["messages"], tools=entry.get("tools"), tokenize=False))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{where} is neither a text nor a chat: {error}", remedy='write {"text": ...} or {"messages": [...]}'
        ) from None
