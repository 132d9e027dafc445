"""Where a step's time goes on the CPU: by kernel of `cpu_native`, and what is left to everything else.

    python benchmarks/cpu_profile.py [MODEL] [--quantization int4] [--batch 1] [--context 64] [--torch]

Each call of a kernel is timed by the wall clock, waiting for other threads included. `decode` is the mean of a step
with --batch requests, `prefill` that of --context tokens. Without MODEL: random weights in Qwen3-0.6B's shape, made
once under --cache as `cpu_peers.py` makes them. On a busy machine only shares mean something, and not much.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import os; os.environ.setdefault("OMP_WAIT_POLICY", os.environ.get("OWP","passive"))


import torch  # noqa: E402
from cpu_peers.environments import default_cache  # noqa: E402
from quire import LLM, SamplingParams  # noqa: E402
from quire_cpu_native import native  # noqa: E402


import os
CLOCK=time.thread_time if os.environ.get('TT') else time.perf_counter
@dataclass
class Times:
    """Seconds and calls by kernel, while `on`."""

    on: bool = False
    seen: list = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, seconds: float) -> None:
        if self.on:
            self.seconds[name] += seconds
            self.calls[name] += 1


def title(name: str, arguments: tuple[Any, ...]) -> str:
    """A kernel's name, with the weight's size if it has one. Arguments are those behind the pool."""
    if name.startswith("codes_linear"):
        fields = native.CodesFields.from_address(arguments[0])
        return f"{name} {fields.outputs} x {fields.inputs}, {fields.bits} bits"
    if name == "linear":
        return f"{name} {arguments[-2]} x {arguments[-1]}"
    return name


def watch(times: Times) -> None:
    """Time every kernel that is asked for from now on."""
    ask = native.Native.function

    def function(self: native.Native, name: str, *form: Any) -> Callable[..., Any]:
        run = ask(self, name, *form)

        def timed(*arguments: Any) -> None:
            began = CLOCK()
            run(*arguments)
            if times.on:
                times.seen.append((name, arguments[-2:] if name == "linear" else arguments[:1], CLOCK() - began))

        return timed

    native.Native.function = function  # type: ignore[method-assign]


class Bench:
    """An engine, and requests for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        length = options.context + options.steps + 16
        self._engine = LLM(
            options.model,
            dtype=options.dtype,
            quantization=options.quantization,
            ops=dict(word.split("=") for word in options.ops),
            num_kv_blocks=options.batch * (length // 16 + 2) + 1,
            max_num_seqs=options.batch,
            max_num_batched_tokens=max(512, options.context),
            max_model_len=length,
            block_size=16,
            enable_prefix_caching=False,
        ).engine
        self._keys = itertools.count()
        self._rng = random.Random(0)

    def add(self, context: int, count: int) -> None:
        """A request of random tokens."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        prompt = [self._rng.randrange(10, 250) for _ in range(context)]
        self._engine.add(self._engine.prepare(str(next(self._keys)), prompt, params))

    def decode(self, batch: int, context: int, steps: int) -> Iterator[None]:
        """Decoding steps of `batch` requests, each taken when the next value is asked for."""
        for _ in range(batch):
            self.add(context, steps + 2)
        started: set[str] = set()
        while len(started) < batch:
            started |= {delta.request_id for delta in self._engine.step()}
        for _ in range(steps):
            yield
            self._engine.step()
        yield
        TIMES.on = False
        self.drain()

    def prefill(self, context: int) -> Iterator[None]:
        """One step: a prompt's."""
        self.add(context, 1)
        yield
        self.drain()
        yield

    def drain(self) -> None:
        """Step until nothing is left."""
        while self._engine.has_work():
            self._engine.step()


def measured(times: Times, steps: Iterator[None]) -> list[float]:
    """Seconds of each step; `times` gathers what its kernels took."""
    taken = []
    next(steps)
    times.on = True
    for _ in itertools.repeat(None):
        began = CLOCK()
        more = next(steps, steps)
        if more is steps:
            break
        taken.append(CLOCK() - began)
    times.on = False
    return taken


def table(what: str, taken: list[float], times: Times, tokens: int) -> None:
    times.on = True
    for n, a, t in times.seen: times.add(title(n, a), t)
    times.on = False
    times.seen.clear()
    """Print a measurement's rows, and forget it."""
    count, total = len(taken), sum(taken)
    print(f"\n{what}: {1000 * total / count:.2f} ms a step, {tokens * count / total:.1f} tokens/s")
    rows = sorted(times.seconds.items(), key=lambda item: -item[1])
    rows.append(("outside kernels", total - sum(times.seconds.values())))
    for name, seconds in rows:
        calls = times.calls.get(name, 0) / count
        print(f"  {name:<44} {calls:>6.1f} calls {1000 * seconds / count:>8.2f} ms {100 * seconds / total:>6.1f} %")
    times.seconds.clear()
    times.calls.clear()


@contextmanager
def torch_operations(wanted: bool) -> Iterator[None]:
    """Print what torch computed meanwhile."""
    if not wanted:
        yield
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        yield
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def main() -> None:
    """Load, warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="folder of a checkpoint")
    add("--cache", type=Path, default=default_cache(), help="where the random model lies: %(default)s")
    add("--dtype", default="bfloat16")
    add("--quantization", help="int4, int8; none")
    add("--ops", nargs="*", default=[], help="KIND=OP_SET, such as quant_linear=native_a8")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--batch", type=int, default=1, help="requests of the decoding step")
    add("--context", type=int, default=64, help="tokens of each request, and of the prompt")
    add("--steps", type=int, default=32, help="decoding steps; a third as many prompts")
    add("--torch", action="store_true", help="also what torch computes in a decoding step, by its profiler")
    options = parser.parse_args()
    if options.model is None:
        from cpu_peers_models import checkpoint

        options.model = str(checkpoint(options.cache))
    torch.set_num_threads(options.threads)
    global TIMES
    TIMES = times = Times()
    watch(times)
    began = time.perf_counter()
    bench = Bench(options)
    print(f"{options.quantization or options.dtype}, {options.threads} threads; loaded in {time.perf_counter() - began:.1f} s")
    for _ in range(2):
        measured(Times(), bench.decode(options.batch, options.context, 4))
    taken = measured(times, bench.decode(options.batch, options.context, options.steps))
    table(f"decode, {options.batch} requests", taken, times, options.batch)
    taken = [seconds for _ in range(max(1, options.steps // 3)) for seconds in measured(times, bench.prefill(options.context))]
    table(f"prefill, {options.context} tokens", taken, times, options.context)
    with torch_operations(options.torch):
        if options.torch:
            measured(Times(), bench.decode(options.batch, options.context, 8))


if __name__ == "__main__":
    main()
