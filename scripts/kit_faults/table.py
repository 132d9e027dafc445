"""All faults."""

from __future__ import annotations

from kit_faults import attention, engine, layers, sampling, text
from kit_faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *attention.FAULTS,
    *engine.FAULTS,
    *sampling.FAULTS,
    *layers.FAULTS,
    *text.FAULTS,
)
