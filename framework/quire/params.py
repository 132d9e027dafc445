"""Sampling parameters: what a caller asks of one request, with the limits that every front end inherits.

Names and defaults are vLLM's, so that a script moves over by changing the import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quire.errors import RequestError

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKEN_LIST = 1024
MAX_COUNT = 2**31 - 1
"""Largest number of tokens, and size of a priority, that can be asked for."""
MAX_SHOWN = 120
"""Characters of a bad value that an error shows."""

TokenId = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class SamplingParams(BaseModel):
    """How one request is sampled. Frozen; raises RequestError naming the field for a bad value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=1, ge=1, le=MAX_N)
    """Outputs per prompt; they share the prompt's KV."""
    temperature: Finite = Field(default=1.0, ge=0.0, le=100.0)
    """Divides the logits; 0 is greedy."""
    top_k: int = Field(default=0, ge=-1, le=MAX_COUNT)
    """Sample among the k most likely tokens; 0 or -1 is off."""
    top_p: Finite = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the fewest tokens whose probabilities reach p."""
    min_p: Finite = Field(default=0.0, ge=0.0, le=1.0)
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    """Makes the output repeatable whatever else is in the batch; None: drawn by the engine."""
    repetition_penalty: Finite = Field(default=1.0, gt=0.0, le=100.0)
    """Divides positive and multiplies negative logits of tokens seen in prompt or output."""
    presence_penalty: Finite = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted once from the logit of each token seen in the output."""
    frequency_penalty: Finite = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from a token's logit once per time it was seen in the output."""
    logit_bias: Mapping[TokenId, Finite] | None = Field(default=None, max_length=MAX_LOGIT_BIAS)
    """Added to the logits of the given token ids."""
    allowed_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1)
    """If given, only these tokens can be sampled."""
    bad_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_TOKEN_LIST)
    """Tokens that are never sampled."""
    max_tokens: int | None = Field(default=16, ge=1, le=MAX_COUNT)
    """Most output tokens; None: as many as the model's length allows."""
    min_tokens: int = Field(default=0, ge=0, le=MAX_COUNT)
    """No stop token is sampled, and no stop string matched, before this many output tokens."""
    stop: tuple[str, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    """Strings that end the output."""
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_TOKEN_LIST)
    """Tokens that end the output, beside the model's own."""
    ignore_eos: bool = False
    """Do not stop at the model's own end tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the token that ended the output, in the text."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Return the sampled token's log probability and this many of the most likely ones."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """The same for every prompt token but the first."""
    detokenize: bool = True
    """Turn token ids into text; False leaves `text` empty and forbids stop strings."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    extra_args: Mapping[str, Any] | None = None
    """Arguments for logits processors; a key that no loaded processor honours is refused."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _request_error(error) from None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _short_stops(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
                raise ValueError(
                    f"each stop string must have 1 to {MAX_STOP_BYTES} bytes; one has {len(text.encode())}"
                )
        return value

    @field_validator("bad_token_ids", "stop_token_ids", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, which is {self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _request_error(error: ValidationError) -> RequestError:
    """The first problem as one sentence that names field, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        import difflib

        close = difflib.get_close_matches(str(field), SamplingParams.model_fields, n=1)
        return RequestError(
            f"{field!r} is not a sampling parameter",
            param=field,
            remedy=f"did you mean {close[0]!r}?" if close else "see SamplingParams for the list",
        )
    text = first["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    value = f"{field} is {_short(first['input'])}: " if field else ""
    return RequestError(value + text, param=field)


def _short(value: Any) -> str:
    """The value as text; of a long one the beginning, for a caller sent it and has it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's generation_config.json asks for where a request says nothing: greedy unless `do_sample`."""
    if not generation_config.get("do_sample"):
        return {"temperature": 0.0}
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    named = {name: generation_config[name] for name in known if generation_config.get(name) is not None}
    return {"temperature": 1.0} | named
