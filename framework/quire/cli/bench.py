"""`quire bench`: throughput of the engine at several batch sizes, and where a step's time goes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from quire.cli.console import note, print_table
from quire.cli.flags import engine_flags
from quire.cli.session import open_session
from quire.contract.metrics import StepStats
from quire.engine.build import engine_from
from quire.engine.engine import Engine
from quire.errors import ConfigError, EngineError
from quire.loader.checkpoint import BUNDLED
from quire.params import SamplingParams

PARTS = ("schedule_s", "build_s", "forward_s", "sample_s", "update_s")


@dataclass(frozen=True, slots=True)
class Result:
    """One batch size. Tokens per second; `steps` is the share of each part in the decode steps' time.

    Attributes:
        batch: requests at once.
        prefill: prompt tokens per second, until every request has its first token.
        decode: output tokens per second after that.
        total: output tokens per second over all.
        host_ms: milliseconds per decode step that are not forward or sampling.
        steps: part of a step -> share of the time.
    """

    batch: int
    prefill: float
    decode: float
    total: float
    host_ms: float
    steps: dict[str, float]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


@engine_flags("model", "process", "step_timeout")
def bench(
    context: typer.Context,
    options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Batch sizes.")] = "1,8,32",
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens per request.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Output tokens per request.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure tokens per second on random prompts. Prefix caching is off unless asked for."""
    sizes = _sizes(batch)
    options = {"enable_prefix_caching": False, "max_num_seqs": str(max(64, *sizes)), **options}
    session = open_session(context, options if model is None else {**options, "model": model})
    if session.configured.config.model is None:
        note(f"no model named: measuring the bundled {BUNDLED}")
    engine = engine_from(session.configured, session.host)
    try:
        _check_lengths(engine, input_len, output_len)
        measure(engine, 1, min(input_len, 16), 2)  # warm up: first calls compile and allocate
        results = [measure(engine, size, input_len, output_len) for size in sizes]
    finally:
        engine.shutdown()
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2))
        return
    headings = (
        "BATCH",
        "PREFILL tok/s",
        "DECODE tok/s",
        "OUTPUT tok/s",
        "HOST ms/step",
        *(p[:-2].upper() for p in PARTS),
    )
    print_table(headings, [_row(result) for result in results])


def measure(engine: Engine, batch: int, input_len: int, output_len: int) -> Result:
    """Run `batch` requests of random tokens from start to end."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    vocab_size = engine.parts.config.spec.vocab_size(engine.parts.config.model_config)
    choose = random.Random(f"{batch}/{input_len}")
    for index in range(batch):
        prompt = [choose.randrange(vocab_size) for _ in range(input_len)]
        engine.add(engine.prepare(f"bench-{batch}-{index}-{time.monotonic_ns()}", prompt, params))
    waiting, decoding, tokens = set(range(batch)), [], 0
    started = time.perf_counter()
    first_done = started
    while engine.has_work():
        deltas = engine.step()
        if failed := next((delta.error for delta in deltas if delta.finish_reason == "error"), None):
            raise EngineError(f"a request failed: {failed}")
        tokens += sum(len(delta.token_ids) for delta in deltas)
        if waiting:
            waiting -= {int(delta.request_id.split("-")[2]) for delta in deltas if delta.token_ids}
            first_done = time.perf_counter()
        elif engine.last_step is not None and deltas:
            decoding.append(engine.last_step)
    ended = time.perf_counter()
    return _result(batch, (started, first_done, ended), (batch * input_len, tokens), decoding)


def _result(
    batch: int, times: tuple[float, float, float], tokens: tuple[int, int], steps: Sequence[StepStats]
) -> Result:
    started, first_done, ended = times
    sums = {part: sum(getattr(step, part) for step in steps) for part in PARTS}
    whole = sum(sums.values()) or 1e-9
    decoded = sum(step.num_sampled for step in steps)
    return Result(
        batch=batch,
        prefill=tokens[0] / max(1e-9, first_done - started),
        decode=decoded / max(1e-9, ended - first_done),
        total=tokens[1] / max(1e-9, ended - started),
        host_ms=1e3 * (sums["schedule_s"] + sums["build_s"] + sums["update_s"]) / max(1, len(steps)),
        steps={part: seconds / whole for part, seconds in sums.items()},
    )


def _row(result: Result) -> list[str]:
    speeds = [f"{result.prefill:,.0f}", f"{result.decode:,.1f}", f"{result.total:,.1f}", f"{result.host_ms:.2f}"]
    return [str(result.batch), *speeds, *(f"{result.steps[part]:.1%}" for part in PARTS)]


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and 1 <= int(word) <= 4096 for word in words):
        raise ConfigError(f"--batch is {text!r}; it must be integers from 1 to 4,096 with commas")
    return [int(word) for word in words]


def _check_lengths(engine: Engine, input_len: int, output_len: int) -> None:
    limit = engine.parts.config.max_model_len
    if input_len + output_len > limit:
        raise ConfigError(
            f"--input-len {input_len:,} and --output-len {output_len:,} exceed max_model_len {limit:,}",
            remedy="lower one of them",
        )
