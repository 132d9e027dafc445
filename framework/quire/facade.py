"""What hooks and front ends are given to look at: read-only views of the host and of a running engine."""

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


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A sequence that holds KV blocks: its id, and its block table. A block in two tables is shared."""

    sequence_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineView:
    """What an engine is doing, between two steps. No token, no text.

    Attributes:
        num_blocks: blocks of the KV pool that can be granted; their ids count from 1.
        num_cached_blocks: free ones whose content a later request may still hit.
        num_waiting, num_running: sequences. num_preemptions: since the start.
        num_step_tokens: tokens of the last step.
        sequences: those that hold blocks.
    """

    num_blocks: int
    num_cached_blocks: int
    num_waiting: int
    num_running: int
    num_preemptions: int
    num_step_tokens: int
    sequences: tuple[SequenceView, ...]
