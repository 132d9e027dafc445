"""Quire: plugin-based, multi-backend inference for large language models. The users' door."""

import quire.waiting  # noqa: F401, before torch is imported
from quire.async_llm import AsyncLLM
from quire.config import EngineConfig
from quire.engine.chat import ChatFormat, ChatPrompt
from quire.engine.intake import Submission
from quire.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    ModelNotFound,
    OutOfMemory,
    PluginError,
    QuireError,
    RequestError,
    UnsupportedModel,
)
from quire.facade import EngineView, SequenceView, StepView
from quire.llm import LLM
from quire.outputs import NOT_FINITE, CompletionOutput, Logprob, OutputDelta, PositionLogprobs, RequestOutput
from quire.params import SamplingParams
from quire.version import __version__

__all__ = [
    "LLM",
    "NOT_FINITE",
    "AsyncLLM",
    "ChatFormat",
    "ChatPrompt",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDead",
    "EngineError",
    "EngineView",
    "Logprob",
    "ModelNotFound",
    "OutOfMemory",
    "OutputDelta",
    "PluginError",
    "PositionLogprobs",
    "QuireError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SequenceView",
    "StepView",
    "Submission",
    "UnsupportedModel",
    "__version__",
]
