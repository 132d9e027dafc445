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
    """A sequence that has not ended.

    Attributes:
        sequence_id: the request's id, and which of its sequences.
        status: waiting, running, or preempted (it lost its blocks, and waits to compute them again).
        num_prompt_tokens, num_tokens: the latter with the output so far.
        num_computed_tokens: those that were handed to the executor; their KV is in its blocks.
        block_ids: its block table. A block in two tables is shared: that is its reference count.
    """

    sequence_id: str
    status: str
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepView:
    """A step that has run: its rows, tokens computed and sampled, wall-clock time at its end in seconds."""

    step_id: int
    time: float
    num_rows: int
    num_tokens: int
    num_sampled: int


@dataclass(frozen=True, slots=True)
class EngineView:
    """What an engine is doing, between two steps. No token, no text.

    Attributes:
        num_blocks: blocks of the KV pool that can be granted; their ids count from 1.
        block_size: tokens that a block holds.
        num_cached_blocks: free ones whose content a later request may still hit.
        cached_block_ids: those, the next to be reclaimed first; none if the allocator does not tell.
        num_waiting, num_running: sequences.
        num_preemptions, num_evictions: since the start; of sequences, and of cached blocks.
        num_query_tokens, num_hit_tokens: looked up in the prefix cache, and found, since the last reset.
        sequences: those that have not ended, in the order of their arrival.
        steps: the last ones, oldest first.
    """

    num_blocks: int
    block_size: int
    num_cached_blocks: int
    cached_block_ids: tuple[int, ...]
    num_waiting: int
    num_running: int
    num_preemptions: int
    num_evictions: int
    num_query_tokens: int
    num_hit_tokens: int
    sequences: tuple[SequenceView, ...]
    steps: tuple[StepView, ...]
