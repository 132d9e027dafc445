"""Python's collector of cyclic garbage, in a process that serves until it is told to stop."""

from __future__ import annotations

import gc

YOUNG = 20_000
"""Objects that may come before those that are young are searched. Little of what serving makes is part of a cycle."""


def spare_what_stays() -> None:
    """Call this when all that is loaded once stands: it will not be searched for garbage again.

    It is a quarter of a million objects, and a search of them all would hold up every stream for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)
