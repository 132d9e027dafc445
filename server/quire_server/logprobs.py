"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quire import Logprob, PositionLogprobs


def chat_content(
    token_ids: Sequence[int], entries: Sequence[PositionLogprobs], num_alternatives: int
) -> list[dict[str, Any]]:
    """The entries of a chat choice's `logprobs.content`."""
    return [
        _token(entry[token]) | {"top_logprobs": [_token(other) for other in best(entry, num_alternatives)]}
        for token, entry in zip(token_ids, entries, strict=True)
    ]


def _token(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": entry.logprob, "bytes": list(text.encode())}


def best(entry: PositionLogprobs, count: int) -> list[Logprob]:
    """The `count` most likely tokens of a position; the one that stands there may not be among them."""
    ranked = sorted(entry.values(), key=lambda item: item.rank or 0)
    return [item for item in ranked if item.rank is not None and item.rank <= count]


class CompletionLogprobs:
    """A completion's `logprobs`, token by token; remembers where the next token's text begins."""

    def __init__(self, num_alternatives: int, token_text: Callable[[int], str]) -> None:
        self._count = num_alternatives
        self._token_text = token_text
        self._offset = 0

    def add(self, token_ids: Sequence[int], entries: Sequence[PositionLogprobs | None]) -> dict[str, list[Any]]:
        """The four lists for these tokens. An entry of None, a prompt's first token, has no probability."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(token_ids, entries, strict=True):
            text = self._token_text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if entry is None else entry[token].logprob)
            found["top_logprobs"].append(None if entry is None else self._alternatives(entry))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found

    def _alternatives(self, entry: PositionLogprobs) -> dict[str, float]:
        return {item.decoded_token or "": item.logprob for item in best(entry, self._count)}


def prompt_logprobs(entries: Sequence[PositionLogprobs | None]) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per position, token id -> its entry."""
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": item.logprob, "rank": item.rank, "decoded_token": item.decoded_token}
            for token, item in entry.items()
        }
        for entry in entries
    ]
