"""Quire with inputs of 16 bits, where weights of 4 bits let it take those of 8 bits, as llama.cpp and OpenVINO do."""

from __future__ import annotations

from cpu_peers.peers import quire
from cpu_peers.protocol import Unavailable

REQUIREMENTS, BUILD = quire.REQUIREMENTS, quire.BUILD


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """As for Quire. Raises Unavailable if weights are not in codes."""
    if precision != "int4":
        raise Unavailable("the choice is for weights in codes")
    return quire.prepare(checkpoint, folder, precision)


class Peer(quire.Peer):
    """The same engine."""

    input_bits = 16
