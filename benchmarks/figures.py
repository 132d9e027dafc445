"""What the server's benchmarks have in common: how their figures are shown and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def show(figures: Mapping[str, float], file: Path | None) -> None:
    """Print name and value a line; write them to `file` too, as JSON, if one is given."""
    for name, value in figures.items():
        print(f"{name:28}{value:10.2f}")
    if file is not None:
        file.write_text(json.dumps(figures, indent=1))
