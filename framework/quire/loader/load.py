"""Streams a checkpoint's tensors into a model, tensor by tensor, and holds it to account for each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from quire.contract.model import CausalLM, ModelInit, ModelSpec
from quire.errors import UnsupportedModel
from quire.loader.checkpoint import Checkpoint
from quire.loader.files import read_tensors
from quire.loader.progress import Progress, Silent

SHOWN = 5
TRIM_EVERY = 256 * 1024 * 1024
"""Bytes of tensors after which freed memory is given back to the system."""


@torch.inference_mode()
def load_model(checkpoint: Checkpoint, spec: ModelSpec, init: ModelInit, progress: Progress | None = None) -> CausalLM:
    """Build the model and load every tensor.

    Layers pack themselves as soon as they are complete, so memory peaks at the model plus one layer.

    Raises:
        UnsupportedModel: a tensor is missing, unexpected or of the wrong shape; it is named.
    """
    progress = progress or Silent()
    progress.phase("building the model")
    model = spec.build(init)
    progress.phase("loading weights", checkpoint.num_bytes)
    unexpected = []
    since_trim = 0
    for name, tensor in read_tensors(checkpoint.tensors):
        if not model.load_weight(name, tensor):
            unexpected.append(name)
        progress.advance(tensor.nbytes)
        since_trim += tensor.nbytes
        if since_trim >= TRIM_EVERY:
            since_trim = 0
            _return_freed_memory()
    _refuse(checkpoint, "has tensors that the model has no place for", unexpected)
    _refuse(checkpoint, "lacks tensors", model.missing_weights())
    progress.phase("packing")
    model.finalize()
    _return_freed_memory()
    progress.close()
    return model


def _refuse(checkpoint: Checkpoint, problem: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise UnsupportedModel(
            f"{checkpoint.name} {problem}: {shown}", remedy="config.json and the weights do not belong together"
        )


def _return_freed_memory() -> None:
    """Unpacked weights come and go while layers pack themselves; glibc keeps what they leave unless it is told."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, which needs no telling or cannot be told
        return
