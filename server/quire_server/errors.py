"""Errors as OpenAI writes them: one nested envelope with all four keys, whatever went wrong."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import BaseModel
from quire import EngineError, RequestError

logger = logging.getLogger(__name__)

INVALID, SERVER = "invalid_request_error", "server_error"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
APOLOGY = "The server had an error while processing your request."


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every error's body."""

    error: ErrorBody


class AnthropicErrorBody(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorEnvelope(BaseModel):
    """Every error's body under Anthropic's paths."""

    type: Literal["error"]
    error: AnthropicErrorBody


class ApiError(Exception):
    """What a client is answered.

    Args:
        status: HTTP status.
        message: what is wrong, which value, what is allowed.
        param: the field at fault, dotted. code: what programs look at.
        kind: OpenAI's `type`.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or (INVALID if status < 500 else SERVER)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same as Anthropic writes it."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else INVALID)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def overloaded(message: str, *, seconds: int = 1, status: int = 503) -> ApiError:
    """A 503, or a 429, with the headers that make clients try again later."""
    headers = {"Retry-After": str(seconds), "Retry-After-Ms": str(1000 * seconds)}
    if status == 429:
        return ApiError(429, message, kind="requests", code="rate_limit_exceeded", headers=headers)
    return ApiError(503, message, code="server_is_overloaded", headers=headers)


def as_api_error(error: Exception, *, prompt_param: str = "prompt") -> ApiError:
    """Whatever a request raised, as the answer to it.

    Args:
        error: what was raised.
        prompt_param: the field of this endpoint that the core calls `prompt`.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        param = prompt_param if error.param == "prompt" else error.param
        return ApiError(400, str(error), param=param, code="invalid_value")
    if isinstance(error, EngineError):
        logger.error("a request failed: %s", error.message)
        return ApiError(503, f"{APOLOGY} {error.message}")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, APOLOGY)


def too_long(limit: int, num_prompt: int, num_output: int | None, where: str) -> ApiError:
    """The context is exceeded, in the words that clients look for."""
    if num_output is None:
        text = f"your {where} resulted in {num_prompt} tokens. Please reduce the length of the {where}."
    else:
        text = (
            f"you requested {num_prompt + num_output} tokens ({num_prompt} in the {where}, {num_output} in the "
            f"completion). Please reduce the length of the {where} or the completion."
        )
    message = f"This model's maximum context length is {limit} tokens. However, {text}"
    return ApiError(400, message, param=where, code="context_length_exceeded")
