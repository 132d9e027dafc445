"""What requests of all APIs have in common: sampling fields, and what is done with fields that are not known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from quire import SamplingParams

from quire_server.errors import ApiError

DIRECT = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "allowed_token_ids",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "skip_special_tokens",
)
"""Fields that `SamplingParams` has under the same name, and whose limits it knows."""

HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields about the request that have no bearing on the answer."""

Allowed = Callable[[Any], bool]
REFUSED: Mapping[str, tuple[Allowed, str]] = {
    "response_format": (lambda v: v == {"type": "text"}, "structured output is not available; leave it out"),
    "structured_outputs": (lambda v: False, "structured output is not available; leave it out"),
    "guided_json": (lambda v: False, "structured output is not available; leave it out"),
    "guided_regex": (lambda v: False, "structured output is not available; leave it out"),
    "guided_choice": (lambda v: False, "structured output is not available; leave it out"),
    "guided_grammar": (lambda v: False, "structured output is not available; leave it out"),
    "grammar": (lambda v: False, "structured output is not available; leave it out"),
    "json_schema": (lambda v: False, "structured output is not available; leave it out"),
    "regex": (lambda v: False, "structured output is not available; leave it out"),
    "ebnf": (lambda v: False, "structured output is not available; leave it out"),
    "structural_tag": (lambda v: False, "structured output is not available; leave it out"),
    "functions": (lambda v: v == [], "use tools"),
    "function_call": (lambda v: v == "none", "use tool_choice"),
    "audio": (lambda v: False, "the model makes text only"),
    "modalities": (lambda v: v == ["text"], "the model makes text only"),
    "prediction": (lambda v: False, "predicted outputs are not available; leave it out"),
    "web_search_options": (lambda v: False, "there is no web search; leave it out"),
    "store": (lambda v: v is False, "nothing is stored; leave it out, or send false"),
    "service_tier": (lambda v: v in ("auto", "default"), "there is one tier: auto"),
    "verbosity": (lambda v: v == "medium", "the model knows no verbosity; leave it out"),
    "suffix": (lambda v: v == "", "text cannot be inserted; leave it out"),
    "previous_response_id": (lambda v: False, "nothing is stored; send the conversation as input"),
    "conversation": (lambda v: False, "nothing is stored; send the conversation as input"),
    "background": (lambda v: v is False, "requests are answered while the client waits; leave it out"),
    "truncation": (lambda v: v == "disabled", "nothing is cut silently; leave it out"),
    "include": (lambda v: v == [], "nothing further can be included; leave it out"),
    "max_tool_calls": (lambda v: False, "the number of calls cannot be limited; leave it out"),
    "container": (lambda v: False, "no code is run here; leave it out"),
    "mcp_servers": (lambda v: False, "no tools are run here; leave it out"),
    "text": (
        lambda v: isinstance(v, dict) and v.get("format") in (None, {"type": "text"}) and set(v) <= {"format"},
        "structured output is not available; leave it out",
    ),
    "use_beam_search": (lambda v: v is False, "beam search is not available; leave it out"),
    "length_penalty": (lambda v: v == 1, "beam search is not available; leave it out"),
    "bad_words": (lambda v: v == [], "words cannot be forbidden; use logit_bias with token ids"),
    "chat_template": (lambda v: False, "the operator chooses the template; leave it out"),
    "documents": (lambda v: v == [], "put documents into the messages"),
}
"""Known fields that cannot be honoured: the values that change nothing, and what to do instead."""


class RequestBody(BaseModel):
    """A request's JSON. Types are strict; null is the same as leaving a field out; unknown fields are kept aside."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    def check_extra(self) -> tuple[str, ...]:
        """Names of unknown fields, which are ignored. Raises ApiError for a known one that cannot be honoured."""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS:
                continue
            if name not in REFUSED:
                unknown.append(name)
                continue
            allowed, advice = REFUSED[name]
            if not allowed(value):
                raise ApiError(400, f"{name} cannot be honoured: {advice}", param=name, code="unsupported_parameter")
        return tuple(unknown)


class StreamOptions(RequestBody):
    """How a stream reports usage."""

    include_usage: bool | None = None
    """Send one more chunk with the usage at the end."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far with every chunk."""


class SamplingFields(RequestBody):
    """Sampling, as OpenAI and vLLM name it; limits are those of `quire.SamplingParams`."""

    model: str | None = None
    """A served model's name; left out: the one that is served."""
    n: int | None = None
    """Answers per prompt."""
    best_of: int | None = None
    """As many as n: no answer is thrown away for a better one."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    min_p: float | None = None
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """Makes the answer repeatable whatever else the server does."""
    repetition_penalty: float | None = None
    """Weakens tokens seen in prompt or output."""
    presence_penalty: float | None = None
    """Subtracted once from tokens seen in the output."""
    frequency_penalty: float | None = None
    """Subtracted from tokens once per time they were seen in the output."""
    logit_bias: dict[str, float] | None = None
    """Token id -> what is added to its logit."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens are sampled."""
    max_tokens: int | None = None
    """Most output tokens."""
    min_tokens: int | None = None
    """Fewest output tokens."""
    stop: str | list[str] | None = None
    """Strings that end the answer."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the answer."""
    ignore_eos: bool | None = None
    """Go on after the model's own end token."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the text."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true by default."""
    prompt_logprobs: int | None = None
    """Log probabilities of the prompt's tokens, with so many alternatives."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Keep only so many tokens of the prompt, the last ones."""
    return_token_ids: bool | None = None
    """Return token ids beside text."""
    priority: int | None = None
    """Lower runs earlier, under the scheduler policy `priority`."""
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    """Share cached prefixes only with requests of the same salt."""
    stream: bool | None = None
    """Send the answer as it is made."""
    stream_options: StreamOptions | None = None
    """For streams only."""

    def sampling(
        self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The parameters; `defaults` fill what the request left out. Raises RequestError or ApiError."""
        if self.best_of not in (None, self.n or 1):
            message = f"best_of is {self.best_of} and n is {self.n or 1}: answers are not chosen from more; use n"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        given = {name: value for name in DIRECT if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        given |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        return SamplingParams(**(dict(defaults) | given))

    def check_extra(self) -> tuple[str, ...]:
        options = () if self.stream_options is None else self.stream_options.check_extra()
        return (*super().check_extra(), *(f"stream_options.{name}" for name in options))

    def check_stream_options(self) -> None:
        """Raises ApiError for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        bad = next(token for token in given if not token.lstrip("-").isdigit())
        message = f"logit_bias has the key {bad[:40]!r}; keys are token ids"
        raise ApiError(400, message, param="logit_bias", code="invalid_value") from None
