"""Where a step's time goes on a CPU: by kernel of `cpu_native`, and what is left to everything else.

    python benchmarks/cpu_profile.py MODEL [--quantization int4] [--batch 1] [--context 64] [--threads 1] [--torch]

`decode` is the mean of a step with --batch requests, `prefill` that of a prompt of --context tokens; both run on the
device `cpu`, eagerly, so that each kernel is seen. Last come medians of decoding steps of that device and of
`cpu_native`, which records them and runs their kernels as one call, in turn. With one thread its processor time is
taken, which a busy machine distorts less; with more, seconds by the clock, waiting included.
`cpu_peers.py --prepare-only --peers quire` makes a MODEL of random weights.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from quire import LLM, SamplingParams  # before torch, so that its threads sleep
from quire_cpu_native.native import CodesFields, Kernel, Native
from torch import get_num_threads, set_num_threads
from torch.profiler import ProfilerActivity, profile

WARM_UP = 12
ROUNDS = 8
"""In which eager and recorded steps take turns."""
Clock = Callable[[], float]


@dataclass
class Times:
    """Kernel, what tells its size, and seconds of each call while `on`; and of each step, in all and within kernels."""

    clock: Clock
    on: bool = False
    calls: list[tuple[str, tuple[Any, ...], float]] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)

    def watch(self) -> None:
        """Time every kernel that is asked for from now on, and every replay of several."""
        ask, run, replay, clock, calls = Native.function, Kernel.__call__, Native.replay, self.clock, self.calls
        names: dict[Kernel, str] = {}

        def function(native: Native, name: str, *form: Any) -> Kernel:
            kernel = ask(native, name, *form)
            names[kernel] = name
            return kernel

        def timed(kernel: Kernel, *arguments: Any) -> None:
            began = clock()
            run(kernel, *arguments)
            if self.on:
                name = names[kernel]
                size = slice(-2, None) if name == "linear" else slice(1)
                calls.append((name, arguments[size], clock() - began))

        def replayed(native: Native, first: int, count: int) -> None:
            began = clock()
            replay(native, first, count)
            if self.on:
                calls.append(("recorded kernels", (), clock() - began))

        Native.function, Native.replay = function, replayed  # type: ignore[method-assign]
        Kernel.__call__ = timed  # type: ignore[method-assign]

    def step(self, work: Callable[[], Any]) -> None:
        """One step, with its kernels."""
        self.on, known = True, len(self.calls)
        began = self.clock()
        work()
        took = self.clock() - began
        self.steps.append((took, sum(seconds for _, _, seconds in self.calls[known:])))
        self.on = False

    def table(self, what: str, tokens: int) -> None:
        """Print what was measured, `tokens` to a step, and forget it."""
        count, total = len(self.steps), sum(took for took, _ in self.steps)
        print(f"\n{what}: {1000 * total / count:.2f} ms a step, {tokens * count / total:.1f} tokens/s")
        kernels: dict[str, list[float]] = {}
        for name, size, seconds in self.calls:
            kernels.setdefault(title(name, size), []).append(seconds)
        outside = total - sum(sum(each) for each in kernels.values())
        for name, each in sorted(kernels.items(), key=lambda item: -sum(item[1])):
            row(name, len(each) / count, sum(each) / count, sum(each) / total)
        row("outside kernels", 0, outside / count, outside / total)
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.calls.clear()
        self.steps.clear()


def row(name: str, calls: float, seconds: float, share: float) -> None:
    """A line of the table."""
    print(f"  {name:<44} {calls:>6.1f} calls {1000 * seconds:>8.2f} ms {100 * share:>6.1f} %")


def title(name: str, size: tuple[Any, ...]) -> str:
    """A kernel's name, with the size of its weight if it has one."""
    if name == "linear":
        return f"{name} {size[0]} x {size[1]}"
    if name.startswith("codes_linear"):
        fields = CodesFields.from_address(size[0])
        return f"{name} {fields.outputs} x {fields.inputs}, {fields.bits} bits"
    return name


class Bench:
    """An engine, and requests for it."""

    def __init__(self, options: argparse.Namespace, device: str = "cpu") -> None:
        length = options.context + options.steps + 2 * WARM_UP + 16
        self.engine = LLM(
            options.model,
            device=device,
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
        self._temperature = options.temperature
        self._keys = itertools.count()
        self._rng = random.Random(0)

    def add(self, context: int, count: int) -> None:
        """A request of random tokens."""
        params = SamplingParams(temperature=self._temperature, max_tokens=count, ignore_eos=True)
        prompt = [self._rng.randrange(10, 250) for _ in range(context)]
        self.engine.add(self.engine.prepare(str(next(self._keys)), prompt, params))

    def start(self, options: argparse.Namespace) -> None:
        """Bring all requests behind their prompts, and a few steps further to get warm."""
        for _ in range(options.batch):
            self.add(options.context, options.steps + 2 * WARM_UP)
        started: set[str] = set()
        while len(started) < options.batch:
            started |= {delta.request_id for delta in self.engine.step()}
        for _ in range(WARM_UP):
            self.engine.step()

    def decode(self, options: argparse.Namespace, times: Times) -> None:
        """Steps of all requests at once."""
        self.start(options)
        for _ in range(options.steps):
            times.step(self.engine.step)
        self.drain()

    def prefill(self, options: argparse.Namespace, times: Times) -> None:
        """Prompts, one after the other; the first is not counted."""
        for index in range(1 + max(1, options.steps // 8)):
            self.add(options.context, 1)
            if index:
                times.step(self.drain)
            else:
                self.drain()

    def drain(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_work():
            self.engine.step()


def in_turn(eager: Bench, options: argparse.Namespace, times: Times) -> None:
    """Print decoding steps, eager and recorded ones in turn."""
    benches = {"eager": eager, "recorded": Bench(options, "cpu_native")}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in benches}
    for bench in benches.values():
        bench.start(options)
    for _ in range(ROUNDS):
        for name, bench in benches.items():
            bench.engine.step()  # the other one's weights are in the caches
            for _ in range(max(1, options.steps // ROUNDS - 1)):
                times.step(bench.engine.step)
            steps[name] += times.steps
            times.clear()
    print(f"\ndecode, {options.batch} requests, medians of {len(steps['eager'])} steps in turn")
    for name, each in steps.items():
        took, outside = median(seconds for seconds, _ in each), median(seconds - within for seconds, within in each)
        print(f"  {name:<10} {1000 * took:>8.2f} ms a step, outside kernels {1000 * outside:>6.2f} ms, ", end="")
        print(f"{100 * outside / took:.1f} %")
    for bench in benches.values():
        bench.drain()


@contextmanager
def torch_operations() -> Iterator[None]:
    """Print what torch computed meanwhile."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("model", help="folder of a checkpoint, or quire-tiny")
    add("--dtype", default="bfloat16")
    add("--quantization", help="int4 or int8")
    add("--ops", nargs="*", default=[], help="KIND=OP_SET, such as quant_linear=native_a8")
    add("--threads", type=int, default=get_num_threads())
    add("--batch", type=int, default=1, help="requests of a decoding step")
    add("--context", type=int, default=64, help="tokens of a prompt")
    add("--steps", type=int, default=32, help="decoding steps, and eight times the prompts")
    add("--temperature", type=float, default=0.0, help="of the requests; 0: greedy")
    add("--torch", action="store_true", help="also what torch computes in decoding steps, by its own profiler")
    return result


def main() -> None:
    """Load, measure, print."""
    options = parser().parse_args()
    set_num_threads(options.threads)
    times = Times(time.thread_time if options.threads == 1 else time.perf_counter)
    times.watch()
    began = time.perf_counter()
    bench = Bench(options)
    seconds = time.perf_counter() - began
    print(f"{options.quantization or options.dtype}, {options.threads} threads, loaded in {seconds:.1f} s")
    bench.decode(options, times)
    times.table(f"decode, {options.batch} requests behind {options.context} tokens", options.batch)
    bench.prefill(options, times)
    times.table(f"prefill, {options.context} tokens", options.context)
    in_turn(bench, options, times)
    if options.torch:
        with torch_operations():
            bench.decode(options, times)


if __name__ == "__main__":
    main()
