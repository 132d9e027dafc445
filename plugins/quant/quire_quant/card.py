"""What came of quantizing a checkpoint: a report for programs, and a model card for readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REPORT = "quantize-report.json"
CARD = """---
base_model: {source}
tags:
- {method}
- {bits}-bit
---
# {source}, {method} of {bits} bits

Made by `quire quantize` from `{source}`: method {method}, {bits} bits, {groups}, {zeros}.

| | before | after |
|---|---|---|
{table}

{errors}

    quire run -m FOLDER "Hello"

Say here what the model is for, what it was trained on, and under which licence it stands.
"""


@dataclass
class Report:
    """What came of it.

    Attributes:
        recipe: `layer.Recipe`'s fields, with the source's name and size and a digest of the calibration rows.
        errors: linear layer -> error of its output relative to the output, root mean square; empty without inputs.
        skipped: linear layers that stay as they were, as they do not fill whole groups and words.
        perplexity_before, perplexity_after: on rows held out from calibration; None without.
        bytes_before, bytes_after: of all weights. seconds: of this run.
    """

    recipe: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of what, before, after."""
        rows = [("bytes of weights", f"{self.bytes_before:,}", f"{self.bytes_after:,}")]
        if self.perplexity_before is not None:
            rows.append(("perplexity, held-out text", f"{self.perplexity_before:.4f}", f"{self.perplexity_after:.4f}"))
        return rows

    def worst(self) -> str:
        """A sentence on the errors of layers; empty without calibration."""
        if not self.errors:
            return ""
        name = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        return f"A layer's output is {mean:.4f} of itself off on average, {name}'s the most: {self.errors[name]:.4f}."


def model_card(report: Report) -> str:
    """A README for the checkpoint: how it was made and what it lost."""
    recipe = report.recipe
    size = recipe["group_size"]
    return CARD.format(
        **{key: recipe[key] for key in ("source", "method", "bits")},
        groups="one scale for each output" if size == -1 else f"groups of {size}",
        zeros="symmetric" if recipe["sym"] else "with zero points",
        table="\n".join(f"| {' | '.join(row)} |" for row in report.table()),
        errors=f"{report.worst()} Each layer's error is in {REPORT}." if report.errors else "No text calibrated it.",
    )
