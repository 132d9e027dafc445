"""Ids of requests and answers: unlike each other, and no secret."""

from __future__ import annotations

import random


def new_id(prefix: str) -> str:
    """128 random bits; not the system's, which other threads would run while it is asked for."""
    return f"{prefix}{random.getrandbits(128):032x}"
