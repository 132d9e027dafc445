"""Whether this machine can run the CUDA kernels. Cheap: `quire plugins list` asks it."""

from __future__ import annotations

import importlib.util

import torch

OLDEST = (8, 0)
"""Compute capability of the oldest GPU that the kernels are compiled and checked for."""


def missing() -> str | None:
    """None if the kernels can run here, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'quire[cuda]'"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return None
