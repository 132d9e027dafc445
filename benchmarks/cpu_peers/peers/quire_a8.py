"""Quire with its kernel for inputs of 8 bits, which llama.cpp and OpenVINO take for weights of 4 bits by themselves."""

from __future__ import annotations

from cpu_peers.peers import quire
from cpu_peers.protocol import Unavailable

REQUIREMENTS, BUILD = quire.REQUIREMENTS, quire.BUILD


def prepare(checkpoint: str, folder: str, precision: str) -> str:
    """As for Quire. Raises Unavailable if weights are not in codes."""
    if precision != "int4":
        raise Unavailable("the kernel is for weights in codes")
    return quire.prepare(checkpoint, folder, precision)


class Peer(quire.Peer):
    """The same engine."""

    quant_kernel = "native_a8"
