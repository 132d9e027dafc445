"""Conformance of attention backends.

What a backend does not declare in its caps is skipped; what it declares and gets wrong is a failure.
"""

from __future__ import annotations

from quire.testing.attention_promises import AttentionPromises
from quire.testing.attention_results import AttentionResults


class AttentionConformance(AttentionPromises, AttentionResults):
    """What every attention backend must hold. Subclass, and give the fixture `backend_class`."""
