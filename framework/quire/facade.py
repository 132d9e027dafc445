"""What hooks are given to look at: read-only views of the host and of a running engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The host that loads a plugin.

    Attributes:
        version: of Quire.
        points: extension point -> (oldest, newest) API version served.
    """

    version: str
    points: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class EngineFacade:
    """A running engine.

    Attributes:
        model: name of the model.
        max_model_len: most tokens of one request.
        num_kv_blocks: blocks in the KV pool. block_size: tokens per block.
        selected: extension point -> name of the provider in use.
    """

    model: str
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    selected: Mapping[str, str]
