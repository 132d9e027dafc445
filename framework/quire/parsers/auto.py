"""Chooses an output parser by the markers in the chat template."""

from __future__ import annotations

from quire.contract.parsing import OutputParser
from quire.registry import AUTO, PluginHost, Selection


def select_parser(host: PluginHost, wanted: str, chat_template: str | None) -> Selection:
    """The named parser, or for `auto` the first whose markers the template contains, else the last resort.

    Raises:
        ConfigError: the named parser cannot be used.
    """

    def check(parser: type[OutputParser]) -> list[str]:
        found = any(marker in (chat_template or "") for marker in parser.markers)
        return [] if found or not parser.markers else [f"the chat template contains none of {list(parser.markers)}"]

    return host.select("output_parser", wanted, check=check if wanted == AUTO else None)
