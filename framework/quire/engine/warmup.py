"""Before anything is served: how much memory a step takes, and the capture of graphs. Steps of padding only are run."""

from __future__ import annotations

import logging
import time

from quire.contract.device import Device, GraphKey
from quire.engine.runner import Runner

logger = logging.getLogger(__name__)


def peak_bytes(runner: Runner, device: Device, largest: GraphKey) -> int:
    """Bytes that steps take while they run: the largest one, and the graphs, whose memory is kept apart.

    Graphs share one pool, which is as large as the largest of them needs.
    """
    peak = device.peak_memory(lambda: runner.rehearse(largest))
    keys = runner.dispatcher.keys
    return peak + (device.peak_memory(lambda: runner.rehearse(keys[0])) if keys else 0)


def capture_graphs(runner: Runner, device: Device) -> None:
    """Capture every size in use, the largest first. A failure is told once; the sizes that are left run eagerly.

    A device that captures later forgets what it has: the caches are new.
    """
    keys = runner.dispatcher.keys
    if not keys:
        return
    if runner.captures_later:
        for key in keys:
            runner.capture(key)
        sizes = keys[-1].num_tokens, keys[0].num_tokens
        logger.info("steps of %d to %d tokens are recorded when they first come", *sizes)
        return
    since, free = time.monotonic(), device.memory().free
    logger.info("capturing %d graphs, for %d to %d tokens", len(keys), keys[-1].num_tokens, keys[0].num_tokens)
    for number, key in enumerate(keys):
        try:
            runner.capture(key)
        except Exception as error:
            logger.warning(
                "graphs of %d sizes are not used, their steps run eagerly: capturing %s failed",
                len(keys) - number,
                key,
                exc_info=error,
            )
            for left in keys[number:]:
                runner.dispatcher.forget(left)
            break
    taken = (free - device.memory().free) / 2**20
    logger.info(
        "captured %d graphs: %.1f s, %.0f MiB", len(runner.dispatcher.keys), time.monotonic() - since, max(0.0, taken)
    )
