"""What all routes of one server share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quire import AsyncLLM

from quire_server.admission import Admission
from quire_server.errors import ApiError
from quire_server.faults import Faults
from quire_server.settings import ServerSettings
from quire_server.sse import Beat, StreamLimits


@dataclass(slots=True)
class ServerState:
    """One served model.

    Attributes:
        llm: answers. settings: of the server. config: resolved configuration with origins, for /server_info.
        admission: who may come in. metrics: renders the metrics, or None. created: when it was started.
        faults: answers that a broken model spoiled.
        is_leaving: told to stop; new requests are still taken until `admission` says otherwise.
        limits: of streams.
    """

    llm: AsyncLLM
    settings: ServerSettings
    config: dict[str, Any] = field(default_factory=dict)
    metrics: Callable[[], bytes] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    is_leaving: bool = False
    faults: Faults = field(default_factory=Faults)
    admission: Admission = field(init=False)
    limits: StreamLimits = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.queue)
        settings = self.settings
        self.limits = StreamLimits(settings.sse_keepalive, settings.write_timeout, Beat(settings.sse_pace))

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which the model is served."""
        return self.settings.served_names or (self.llm.info.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError for a model that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            shown = name[:200]
            message = f"The model `{shown}` does not exist; served is `{'`, `'.join(self.names)}`."
            raise ApiError(404, message, code="model_not_found")
        return name
