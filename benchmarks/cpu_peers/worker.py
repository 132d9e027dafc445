"""`python -m cpu_peers.worker PEER`, run in the peer's environment: a JSON request in, a JSON answer out."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from types import ModuleType

from cpu_peers.measure import Measurement
from cpu_peers.protocol import Answer, Request, Unavailable
from cpu_peers.workload import Point


def answer(module: ModuleType, request: Request) -> Answer:
    """Do what is asked; a failure of one point does not take the others with it."""
    try:
        begin = time.perf_counter()
        path = module.prepare(request.checkpoint, request.folder, request.precision)
        if request.action == "prepare":
            return Answer(extra={"prepare s": time.perf_counter() - begin})
        begin = time.perf_counter()
        peer = module.Peer(path, request)
        loaded = time.perf_counter() - begin
        measurement = Measurement(peer, request.seed)
        probe = measurement.probe(begin)
    except Unavailable as reason:
        return Answer(reasons={"all": str(reason)})
    figures, reasons = {}, {}
    for point in map(Point.parse, request.points):
        if reason := peer.skips.get(point.kind):
            reasons[str(point)] = reason
            continue
        try:
            figures[str(point)] = measurement.measure(point)
        except Exception as error:
            traceback.print_exc()
            reasons[str(point)] = f"{type(error).__name__}: {error}"[:300]
    extra = {"load s": loaded} | measurement.extra
    return Answer(figures, reasons, peer.notes, extra, probe)


def main() -> None:
    """Answer the request on the standard input."""
    module = importlib.import_module(f"cpu_peers.peers.{sys.argv[1]}")
    print(answer(module, Request.read(sys.stdin.read())).write(), flush=True)


if __name__ == "__main__":
    main()
