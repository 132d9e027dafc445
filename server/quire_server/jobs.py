"""From request bodies to jobs: everything that can be wrong with a request is found here, before the first byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire import AsyncLLM, ChatPrompt, RequestError, SamplingParams, Submission
from quire.plugin import OutputParser

from quire_server.errors import ApiError, too_long
from quire_server.fields import SamplingFields
from quire_server.generation import Job
from quire_server.protocol import ChatRequest, CompletionRequest, Message, Tool
from quire_server.settings import ServerSettings

MAX_PROMPTS = 1024
COMPLETION_TOKENS = 16
"""Output tokens of a completion that names no limit, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose request it is.

    Attributes:
        request_id: of the request. tenant: told apart by the key, where there are several; they share no prefixes,
            since how soon an answer begins would tell one what another has asked.
    """

    request_id: str
    tenant: str = ""


def chat_job(
    llm: AsyncLLM, settings: ServerSettings, body: ChatRequest, sender: Sender, where: str = "messages"
) -> Job:
    """Render and check a conversation, which the API calls `where`. Raises ApiError or RequestError."""
    prompt = chat_prompt(llm, body)
    tools = shown_tools(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.sampling(
        llm.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=_chat_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
    )
    submission = _submission(llm, body, prompt.token_ids, params, sender, where)
    parsers = [_parser(llm, tools, prompt.in_reasoning) for _ in range(params.n)]
    tell = bool(body.return_token_ids) or body.prompt_logprobs is not None
    return Job((submission,), parsers, tell, settings.queue.timeout, settings.request_timeout)


def chat_prompt(llm: AsyncLLM, body: ChatRequest) -> ChatPrompt:
    """Render a conversation. Raises ApiError or RequestError."""
    return llm.chat.prompt(
        [as_template_message(index, message) for index, message in enumerate(body.messages)],
        tools=shown_tools(body),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        **template_arguments(body),
    )


def shown_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model is shown."""
    return template_tools(body.tools) if body.tool_choice != "none" else []


def completion_job(llm: AsyncLLM, settings: ServerSettings, body: CompletionRequest, sender: Sender) -> Job:
    """Tokenize and check prompts. Raises ApiError or RequestError."""
    prompts = _prompts(body)
    scored = body.echo and body.logprobs is not None
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if only_echo(body):
        max_tokens = 1
    params = body.sampling(
        llm.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if scored and body.prompt_logprobs is None else body.prompt_logprobs,
    )
    explicit = body.max_tokens is not None and not only_echo(body)
    submissions = tuple(
        _submission(
            llm,
            body,
            llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            params,
            Sender(f"{sender.request_id}-{index}", sender.tenant),
            "prompt",
            clamp=not explicit,
        )
        for index, prompt in enumerate(prompts)
    )
    tell = bool(body.echo or body.return_token_ids) or body.prompt_logprobs is not None
    return Job(submissions, (), tell, settings.queue.timeout, settings.request_timeout)


def only_echo(body: CompletionRequest) -> bool:
    """Whether nothing is to be generated, only the prompt to be scored."""
    return bool(body.echo) and body.max_tokens == 0


def as_template_message(index: int, message: Message) -> dict[str, Any]:
    """The message as templates read it. Raises ApiError for content that is no text."""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if isinstance(message.content, list):
        for place, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400,
                    f"content of type {part.type[:40]!r} is not supported; the model reads text",
                    param=f"messages.[{index}].content.[{place}].type",
                    code="unsupported_value",
                )
        found["content"] = "".join(part.text or "" for part in message.content)
    else:
        found["content"] = message.content if message.content is not None else ""
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if (thought := message.reasoning_content or message.reasoning) is not None:
        found["reasoning_content"] = thought
    return found


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """The tools as templates read them."""
    return [tool.model_dump(exclude_unset=True) for tool in tools or ()]


def template_arguments(body: ChatRequest) -> dict[str, Any]:
    """Further arguments of the chat template."""
    arguments = dict(body.chat_template_kwargs or {})
    taken = {"tools", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    if bad := sorted(taken & set(arguments)):
        raise ApiError(400, f"chat_template_kwargs must not hold {bad[0]!r}", param="chat_template_kwargs")
    if body.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
        arguments.setdefault("enable_thinking", body.reasoning_effort != "none")
    return arguments


def _submission(
    llm: AsyncLLM,
    body: SamplingFields,
    token_ids: Sequence[int],
    params: SamplingParams,
    sender: Sender,
    where: str,
    *,
    clamp: bool = False,
) -> Submission:
    limit = llm.info.max_model_len
    if body.truncate_prompt_tokens is not None:
        token_ids = token_ids[-body.truncate_prompt_tokens :]
    if len(token_ids) >= limit:
        raise too_long(limit, len(token_ids), None, where)
    if params.max_tokens is not None and not clamp and len(token_ids) + params.max_tokens > limit:
        raise too_long(limit, len(token_ids), params.max_tokens, where)
    return llm.prepare(
        token_ids,
        params,
        request_id=sender.request_id,
        priority=body.priority or 0,
        cache_salt=sender.tenant + (body.cache_salt or ""),
    )


def _parser(llm: AsyncLLM, tools: Sequence[Mapping[str, Any]], in_reasoning: bool) -> OutputParser:
    return llm.chat.new_parser(tools=tools, in_reasoning=in_reasoning)


def _chat_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    return (body.top_logprobs or 0) if body.logprobs else None


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """One prompt or several: a text or a list of ids is one."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise RequestError("prompt is an empty list", param="prompt", remedy="give at least one prompt")
    if len(given) > MAX_PROMPTS:
        raise RequestError(f"{len(given)} prompts in one request", param="prompt", remedy=f"at most {MAX_PROMPTS}")
    return list(given)
