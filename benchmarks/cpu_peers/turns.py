"""`python -m cpu_peers.turns PEER`, run in the peer's environment: decodes a few steps whenever it is asked to.

The first line of the standard input is a request, as for `cpu_peers.worker`; then each line is a number of steps, and
is answered by tokens per second. Standard library only.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time

from cpu_peers.measure import Engine
from cpu_peers.protocol import MARK, Request, Unavailable
from cpu_peers.workload import Point, prompt

WARM_UP = 8
"""Steps behind the prompts, in which Quire records its own."""


def started(engine: Engine, point: Point, tokens: int, seed: int) -> Engine:
    """The engine with all requests of the point behind their prompts, and warm; each has `tokens` to come.

    Raises:
        Unavailable: the engine has no part in such points.
    """
    if reason := engine.skips.get(point.kind):
        raise Unavailable(f"takes no turns: {reason}")
    rng = random.Random(seed)
    waiting = {str(index) for index in range(point.batch)}
    for key in sorted(waiting):
        engine.add(key, prompt(rng, point.context, engine.vocab), tokens)
    while waiting:
        waiting -= {key for key, found in engine.step() if found}
    for _ in range(WARM_UP):
        engine.step()
    return engine


def rate(engine: Engine, steps: int) -> float:
    """Tokens per second of so many steps. Raises ValueError once a request has ended."""
    begin = time.perf_counter()
    produced = [len(found) for _ in range(steps) for _, found in engine.step()]
    seconds = time.perf_counter() - begin
    if not engine.busy():
        raise ValueError("the requests have ended; begin with fewer windows or steps")
    return sum(produced) / seconds


def main() -> None:
    """Load, then answer until the input ends."""
    module = importlib.import_module(f"cpu_peers.peers.{sys.argv[1]}")
    request = Request.read(sys.stdin.readline())
    point, room = map(Point.parse, request.points)  # what to do, and what there must be room for
    path = module.prepare(request.checkpoint, request.folder, request.precision)
    engine = started(module.Peer(path, request), point, room.context - point.context, request.seed)
    print(MARK + json.dumps(engine.notes), flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(rate(engine, int(line))), flush=True)


if __name__ == "__main__":
    main()
