"""`LLM`: the engine in the caller's own thread, for scripts. Shapes follow vLLM's class of that name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from tqdm import tqdm

from quire.config import EngineConfig
from quire.engine.build import build_engine
from quire.engine.engine import Engine
from quire.engine.intake import Prompt, Submission
from quire.errors import RequestError
from quire.outputs import OutputDelta, RequestOutput
from quire.params import SamplingParams
from quire.registry import PluginHost
from quire.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""One chat message: `{"role": ..., "content": ...}`."""


class LLM:
    """A model, ready to generate.

    Args:
        model: a folder, a Hugging Face id, or None for the bundled quire-tiny.
        host: the loaded plugins; None loads those that are installed.
        config: a complete configuration, instead of options.
        options: fields of `EngineConfig`.

    Raises:
        ConfigError: the configuration cannot be run; the message says why and what to do.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        host: PluginHost | None = None,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        self._engine: Engine = build_engine(model, options, host=host, config=config)
        self._ids = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine, for statistics."""
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.parts.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; outputs stand in the prompts' order.

        Args:
            prompts: text, token ids, or mappings with `prompt` or `prompt_token_ids`.
            sampling_params: one for all, or one per prompt; None: the defaults.
            use_tqdm: show a progress bar.
            priority: one per prompt, lower runs earlier, for the `priority` policy.

        Raises:
            RequestError: a prompt or its parameters cannot be honoured; nothing has run then.
        """
        items = _as_list(prompts)
        params = _spread(sampling_params, len(items))
        if priority is not None and len(priority) != len(items):
            raise RequestError(f"{len(priority)} priorities for {len(items)} prompts", param="priority")
        submissions = [
            self._engine.prepare(f"{next(self._ids)}", item, param, priority=priority[index] if priority else 0)
            for index, (item, param) in enumerate(zip(items, params, strict=True))
        ]
        return self._run(submissions, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, rendered by the model's chat template.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = [
            self.get_tokenizer().apply_chat_template(
                cast(Sequence[Message], conversation),
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[OutputDelta]:
        """Yield one request's deltas as they are made. Leaving the loop early aborts the request."""
        request_id = f"{next(self._ids)}"
        self._engine.add(self._engine.prepare(request_id, prompt, sampling_params or SamplingParams()))
        finished = False
        try:
            while not finished:
                for delta in self._engine.step():
                    if delta.request_id == request_id:
                        finished = finished or delta.finished
                        yield delta
        finally:
            if not finished:
                self._abort([request_id])

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""
        self._engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Let the model and its caches go."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(self, submissions: Sequence[Submission], use_tqdm: bool) -> list[RequestOutput]:
        outputs = {
            item.request_id: RequestOutput.begin(
                item.request_id,
                item.prompt,
                item.prompt_token_ids,
                item.params.n,
                prompt_logprobs=item.params.prompt_logprobs is not None,
            )
            for item in submissions
        }
        added: list[str] = []
        try:
            for item in submissions:
                self._engine.add(item)
                added.append(item.request_id)
            with _Progress(len(submissions), use_tqdm) as progress:
                while self._engine.has_work():
                    for delta in self._engine.step():
                        outputs[delta.request_id].add(delta)
                        progress.count(delta)
        except BaseException:
            self._abort(added)
            raise
        return list(outputs.values())

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
        # Told at once, so that slots and blocks do not wait for the next call.
        while self._engine.has_work():
            self._engine.step()


class _Progress:
    """A bar over requests that shows output tokens per second."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="Generating", unit="req", disable=not shown, dynamic_ncols=True)
        self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def count(self, delta: OutputDelta) -> None:
        self._tokens += len(delta.token_ids)
        if delta.finished:
            elapsed = self._bar.format_dict["elapsed"] or 1e-9
            self._bar.set_postfix_str(f"{self._tokens / elapsed:.1f} tok/s", refresh=False)
            self._bar.update()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, a mapping or a list of ids is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts", param="sampling_params")
    return list(params)
