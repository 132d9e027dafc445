"""A checkpoint's tokenizer, its chat template, and the tokens that end an answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, RequestError
from quire.tokenizer.rendering import Renderer, RenderError

PRIVATE_USE = range(0xE000, 0xE100)
"""Characters that stand for nothing; one that no message contains marks where text must not join."""
TRUSTED_ROLES = frozenset({"system", "developer", "assistant"})
"""Roles whose text is the operator's or the model's own; in that of all others special tokens stay plain text."""


class Tokenizer:
    """Wraps the tokenizer that transformers loads from a checkpoint. Safe to use from several threads.

    Attributes:
        stop_token_ids: tokens that end an output. special_token_ids: those that are no text.
        is_bytewise: each token stands for the same bytes whatever surrounds it.

    Args:
        folder: the checkpoint.
        generation_config: the checkpoint's generation_config.json, which may name further end tokens.
        chat_template: a Jinja template instead of the checkpoint's.
        template_timeout: seconds that the template may take for a conversation, in a process of its own
            that is killed then; None: it is rendered in this process, without limits.

    Raises:
        ConfigError: the folder holds no tokenizer that can be loaded.
    """

    def __init__(
        self,
        folder: Path,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        template_timeout: float | None = None,
    ) -> None:
        from tokenizers.decoders import ByteLevel
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the tokenizer of {folder} cannot be loaded: {str(error).splitlines()[0]}",
                remedy="the folder needs tokenizer.json and tokenizer_config.json",
            ) from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._renderer = Renderer(template_timeout)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self.is_bytewise = isinstance(getattr(self._backend, "decoder", None), ByteLevel)
        self._token_texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.stop_token_ids = self._end_tokens(generation_config or {})
        added = self._tokenizer.added_tokens_decoder
        special = {token: entry.content for token, entry in added.items() if entry.special}
        self.special_token_ids = frozenset({*special, *self._tokenizer.all_special_ids})
        self._special_texts = frozenset({*special.values(), *self._tokenizer.all_special_tokens})
        self._added_texts = frozenset(entry.content for entry in added.values())

    @property
    def chat_template(self) -> str | None:
        """The template, of several that named `default`, or None."""
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens spelt out in the text are recognised."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        ids = list(token_ids)
        if self._backend is not None:  # a third of the time, and this runs for every token of every request
            return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token_id: int, *, skip_special_tokens: bool = False) -> str:
        """One token as text; remembered, for it is asked for once per token that is made."""
        known = self._token_texts[skip_special_tokens]
        text = known.get(token_id)
        if text is None:
            text = known[token_id] = self.decode([token_id], skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The conversation as the template writes it. Raises RequestError without one, or if it refuses."""
        if not messages:
            raise RequestError("messages is empty", param="messages", remedy="give at least one message")
        if chat_template is None and self.chat_template is None:
            raise RequestError(
                "the model has no chat template",
                param="messages",
                remedy="set chat_template to a Jinja file, or send a plain prompt",
            )
        options = {"tools": [dict(tool) for tool in tools] if tools else None}
        try:
            return self._renderer.render(
                {
                    **options,
                    "template": self._tokenizer.get_chat_template(chat_template, **options),
                    # As transformers does: many templates write out a None that they find.
                    "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
                    "add_generation_prompt": add_generation_prompt and not continue_final_message,
                    "continue_final_message": continue_final_message,
                    "arguments": {**self._tokenizer.special_tokens_map, **template_arguments},
                }
            )
        except (RenderError, ValueError) as error:  # ValueError: of several templates none is named `default`
            raise RequestError(f"the chat template refused the messages: {error}", param="messages") from error

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """The conversation's token ids; arguments as for `render_chat`.

        Text of users and tools never yields a special token: one that is spelt out there is cut in
        two before the template runs, and the parts are tokenized apart. All else is tokenized as
        transformers does it.
        """
        markers = self._markers(arguments.get("chat_template"))
        joint = _joint(messages, markers)
        if joint is None:
            return self.encode(self.render_chat(messages, **arguments), add_special_tokens=False)
        text = self.render_chat([_defuse(message, markers, joint) for message in messages], **arguments)
        return [token for piece in text.split(joint) for token in self.encode(piece, add_special_tokens=False)]

    def _markers(self, chat_template: str | None) -> list[str]:
        """What must not be spelt out: special tokens, and added ones that the template gives a meaning.

        Other added tokens are words like any: line breaks, runs of spaces, HTML tags.
        """
        template = chat_template or str(self._tokenizer.chat_template)
        named = {text for text in self._added_texts if text.strip() and text in template}
        # One character cannot be cut; no known tokenizer has such a marker.
        return sorted((text for text in self._special_texts | named if len(text) > 1), key=len)

    def _end_tokens(self, generation_config: Mapping[str, Any]) -> frozenset[int]:
        named = generation_config.get("eos_token_id")
        ids = {named} if isinstance(named, int) else set(named or ())
        if self._tokenizer.eos_token_id is not None:
            ids.add(self._tokenizer.eos_token_id)
        return frozenset(ids)


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return []


def _joint(messages: Sequence[Mapping[str, Any]], markers: Sequence[str]) -> str | None:
    """A character that no message contains, if any untrusted text spells out a marker."""
    # The parts of a message are joined: templates write them one after another.
    texts = ["".join(_texts(message)) for message in messages if message.get("role") not in TRUSTED_ROLES]
    if not any(marker in text for text in texts for marker in markers):
        return None
    everything = repr(list(messages)) + "".join(text for message in messages for text in _texts(message))
    joint = next((chr(code) for code in PRIVATE_USE if chr(code) not in everything), None)
    if joint is None:
        raise RequestError(
            "the messages spell out a special token and hold every private-use character from U+E000 to U+E0FF",
            param="messages",
            remedy="leave out one or the other",
        )
    return joint


def _defuse(message: Mapping[str, Any], markers: Sequence[str], joint: str) -> dict[str, Any]:
    changed = copy.deepcopy(dict(message))
    if message.get("role") in TRUSTED_ROLES:
        return changed
    content = changed.get("content")
    if isinstance(content, str):
        changed["content"] = _cut(content, markers, joint)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] = joint + _cut(part["text"], markers, joint)  # parts may make a marker together
    return changed


def _cut(text: str, markers: Sequence[str], joint: str) -> str:
    for marker in markers:
        while marker in text:  # again, for markers that overlap themselves: "@@" in "@@@"
            text = text.replace(marker, marker[0] + joint + marker[1:])
    return text
