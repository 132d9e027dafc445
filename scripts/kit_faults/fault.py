"""What a seeded fault is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.testing.certify import case_of


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: what an author got wrong. point: the extension point.
        subject: the faulty implementation, as the point's kit takes it.
        attributes: of the kit, such as `samples`.
    """

    name: str
    point: str
    subject: Any
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def case(self) -> type:
        """The kit's class for it."""
        return case_of(self.point, self.subject, **self.attributes)
