"""Engine benchmark on random weights of Qwen3-0.6B's shape: Quire beside transformers' `generate`, in one run.

    python benchmarks/engine.py [--json FILE] [--layers 28] [--skip mixed,deterministic]

Each part runs in a process of its own, the two programs in turn, so that their memory can be told
apart. Machines differ and are shared: what counts is the ratio. Peak memory is the resident set.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
CONTEXT = 64
NEW_TOKENS = 24
PREFILL = 512
MIXED_REQUESTS = 64
MIXED_SAMPLE = 4
"""Requests of the mixed workload that are also run one by one through `generate`, which is too slow for all."""
ROUNDS = 3


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random bfloat16 weights in Qwen3-0.6B's shape, with a tokenizer."""
    import torch
    from quire.testing.tiny_models import save_byte_tokenizer
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_byte_tokenizer(folder)


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids of a prompt that shares nothing with others."""
    rng = random.Random(seed)
    return [rng.randrange(10, 150_000) for _ in range(length)]


def mixed_workload() -> list[tuple[list[int], int]]:
    """(prompt, output tokens): 16 to 256 of each."""
    rng = random.Random(1)
    return [(random_prompt(rng.randrange(16, 257), i), rng.randrange(16, 257)) for i in range(MIXED_REQUESTS)]


class QuireSide:
    """Quire's engine."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from quire import LLM

        self.llm = LLM(
            str(folder), dtype="bfloat16", num_kv_blocks=2400, max_num_seqs=64, max_model_len=2048, **options
        )
        self._seed = 0

    def decode(self, batch: int) -> float:
        """Tokens per second once every request has its first token."""
        from quire import SamplingParams

        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        for _ in range(batch):
            self._seed += 1
            engine.add(engine.prepare(f"d{self._seed}", random_prompt(CONTEXT, self._seed), params))
        started: set[str] = set()
        while len(started) < batch:
            started |= {delta.request_id for delta in engine.step()}
        begin, count = time.perf_counter(), 0
        while engine.has_work():
            count += sum(len(delta.token_ids) for delta in engine.step())
        return count / (time.perf_counter() - begin)

    def prefill(self) -> float:
        """Prompt tokens per second of one long prompt."""
        from quire import SamplingParams

        self._seed += 1
        prompt = random_prompt(PREFILL, self._seed)
        begin = time.perf_counter()
        self.llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        return PREFILL / (time.perf_counter() - begin)

    def mixed(self) -> float:
        """Output tokens per second of the mixed workload."""
        from quire import SamplingParams

        work = mixed_workload()
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in work]
        begin = time.perf_counter()
        self.llm.generate([prompt for prompt, _ in work], params, use_tqdm=False)
        return sum(count for _, count in work) / (time.perf_counter() - begin)

    def matmul_share(self) -> float:
        """Share of a decode step at batch 1 that is spent in matrix multiplication."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as prof:
            self.decode(1)
        events = prof.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        names = ("linear_pointwise", "mkldnn_linear", "addmm", "aten::mm", "bmm", "scaled_dot_product")
        inside = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in names))
        return inside / total


class TransformersSide:
    """transformers' `generate`, static batches."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._seed = 0

    def _generate(self, prompts: Sequence[list[int]], count: int) -> float:
        ids = self._torch.tensor(prompts)
        begin = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
        return time.perf_counter() - begin

    def decode(self, batch: int) -> float:
        self._seed += 1
        prompts = [random_prompt(CONTEXT, self._seed * 100 + i) for i in range(batch)]
        rest = self._generate(prompts, NEW_TOKENS) - self._generate(prompts, 1)
        return batch * (NEW_TOKENS - 1) / rest

    def prefill(self) -> float:
        self._seed += 1
        return PREFILL / self._generate([random_prompt(PREFILL, self._seed)], 1)

    def mixed(self) -> float:
        work = mixed_workload()[:MIXED_SAMPLE]
        seconds = sum(self._generate([prompt], count) for prompt, count in work)
        return sum(count for _, count in work) / seconds


def median(measure: Callable[[], float], rounds: int = ROUNDS) -> float:
    """Median of some measurements, after one that warms up."""
    measure()
    return statistics.median(measure() for _ in range(rounds))


def overhead_ms() -> dict[str, float]:
    """Milliseconds per step at 64 running requests that are neither model nor sampler, on a tiny model."""
    from quire import LLM, SamplingParams
    from quire.testing.tiny_models import make_checkpoint as make_tiny

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(str(make_tiny("llama", Path(folder) / "tiny")), max_num_seqs=64, num_kv_blocks=2000)
        engine = llm.engine
        for index in range(64):
            params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
            engine.add(engine.prepare(str(index), [3 + index % 200] * 30, params))
        steps = []
        while engine.has_work():
            engine.step()
            stats = engine.last_step
            if stats is not None and stats.num_rows == 64 and stats.num_tokens == 64:
                steps.append(stats)
        return {
            part: 1000 * statistics.median(getattr(stats, f"{part}_s") for stats in steps)
            for part in ("schedule", "build", "update")
        }


def part(name: str, folder: Path) -> dict[str, Any]:
    """One part of the benchmark; run in its own process."""
    if name == "overhead":
        return overhead_ms()
    if name == "quire mixed":
        return {"mixed": QuireSide(folder).mixed()}
    if name == "transformers mixed":
        return {"mixed": TransformersSide(folder).mixed()}
    if name == "deterministic":
        side = QuireSide(folder, deterministic=True)
        return {f"decode {batch}": median(lambda batch=batch: side.decode(batch), 1) for batch in (1, 8)}
    sides: dict[str, Callable[[Path], Any]] = {"quire": QuireSide, "transformers": TransformersSide}
    begin = time.perf_counter()
    side = sides[name](folder)
    result: dict[str, Any] = {"load s": time.perf_counter() - begin}
    for batch in BATCHES:
        result[f"decode {batch}"] = median(lambda batch=batch: side.decode(batch))
    result[f"prefill {PREFILL}"] = median(side.prefill)
    result["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if isinstance(side, QuireSide):
        engine = side.llm.engine
        result["pool MB"] = engine.parts.num_kv_blocks * engine.parts.executor.kv_budget().bytes_per_block / 2**20
        result["not matmul"] = 1 - side.matmul_share()
    return result


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """Run one part in a fresh process."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"part {name!r} failed:\n{answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--layers", type=int, default=28, help="fewer make a quicker, smaller model")
    parser.add_argument("--skip", default="", help="parts to leave out: overhead, deterministic, mixed")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part(options.part, options.folder)))
        return
    skipped = set(options.skip.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder, options.layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
        parts = ["quire", "transformers"]
        parts += [] if "mixed" in skipped else ["quire mixed", "transformers mixed"]
        parts += [item for item in ("deterministic", "overhead") if item not in skipped]
        results = {}
        for item in parts:
            print(f"{item} ...", file=sys.stderr, flush=True)
            results[item] = in_process(item, folder)
    results["machine"] = {"platform": platform.platform(), "weights MB": size, "layers": options.layers}
    report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    ours, theirs = results["quire"], results["transformers"]
    if "quire mixed" in results:
        ours, theirs = ours | results["quire mixed"], theirs | results["transformers mixed"]
    print(f"{'tokens/s':14} {'quire':>9} {'transformers':>13} {'ratio':>6}")
    for key in (*(f"decode {batch}" for batch in BATCHES), f"prefill {PREFILL}", "mixed"):
        if key in ours:
            print(f"{key:14} {ours[key]:9.1f} {theirs[key]:13.1f} {ours[key] / theirs[key]:6.2f}")
    rest = ours["peak MB"] - ours["pool MB"] - results["machine"]["weights MB"]
    print(f"peak memory: quire {ours['peak MB']:.0f} MB, transformers {theirs['peak MB']:.0f} MB")
    weights = results["machine"]["weights MB"]
    print(f"quire: weights {weights:.0f} MB, KV pool {ours['pool MB']:.0f} MB, the rest {rest:.0f} MB")
    print(f"share of a decode step that is not matrix multiplication: {100 * ours['not matmul']:.1f} %")
    for batch, value in results.get("deterministic", {}).items():
        print(f"deterministic {batch}: {value:.1f} tokens/s, {value / ours[batch]:.2f} of the default")
    if "overhead" in results:
        split = ", ".join(f"{name} {value:.2f} ms" for name, value in results["overhead"].items())
        print(f"per step at 64 running requests: {split}; {sum(results['overhead'].values()):.2f} ms in all")


if __name__ == "__main__":
    main()
