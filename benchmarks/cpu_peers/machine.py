"""The machine: whether it is quiet, and its limits, which `python -m cpu_peers.machine THREADS` prints."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LOAD_PER_CORE = 0.5
"""Load average of the last minute, per core, from which a machine is busy."""
SHARE = 0.95
"""Of a core; a process that spins and gets less has a rival."""
SPIN_SECONDS = 0.5
SPIN = """
import time
wall, cpu = time.perf_counter(), time.process_time()
while time.perf_counter() - wall < {seconds}:
    pass
print((time.process_time() - cpu) / (time.perf_counter() - wall))
"""


@dataclass(frozen=True, slots=True)
class Quiet:
    """What was found: the last minute's load average, and the share of a core that each spinning process got."""

    load: float
    shares: Sequence[float]

    def reasons(self, cores: int) -> list[str]:
        """Why the machine counts as busy; empty if it does not."""
        found = []
        if self.load > LOAD_PER_CORE * cores:
            found.append(f"the load average is {self.load:.2f}, more than {LOAD_PER_CORE * cores:.2f}")
        if min(self.shares) < SHARE:
            found.append(f"a spinning process got {min(self.shares):.2f} of a core, less than {SHARE}")
        return found


def look(cores: int, spin: Callable[[int], list[float]] | None = None) -> Quiet:
    """Read the load average, and let one process per core spin."""
    load = os.getloadavg()[0]
    return Quiet(load, (spin or spin_shares)(cores))


def spin_shares(count: int, seconds: float = SPIN_SECONDS) -> list[float]:
    """The share of a core that each of `count` processes gets that spin at once."""
    command = [sys.executable, "-c", SPIN.format(seconds=seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [float(process.communicate()[0]) for process in running]


def cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name and the vector extensions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    found = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(found) or 'no vector extension known'})"


def limits(threads: int) -> dict[str, float]:
    """Read bandwidth in GB/s, and the matmul rate in GFLOP/s, by torch."""
    import torch

    torch.set_num_threads(threads)
    memory = torch.ones(1 << 28, dtype=torch.float32)  # 1 GiB, more than any cache
    size = 2048
    result = {"read GB/s": 4 * memory.numel() / _median_seconds(memory.sum) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        seconds = _median_seconds(lambda left=left, right=right: torch.nn.functional.linear(left, right))
        result[f"{name} matmul GFLOP/s"] = 2 * size**3 / seconds / 1e9
    return result


def _median_seconds(work: Callable[[], object], times: int = 5) -> float:
    """Median seconds of some calls after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps(limits(int(sys.argv[1]))))
