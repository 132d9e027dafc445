"""Quire beside llama.cpp, OpenVINO and transformers on this machine's CPU, in one run on random weights.

    python benchmarks/cpu_peers.py [--quick] [--models qwen3-0.6b,llama-3.2-1b] [--peers quire,llama_cpp,...]

Each peer lives in a virtual environment of its own under --cache, made by pip when it is missing (llama.cpp and its
server are built from source, which takes some minutes each), and each measurement runs in a process of its own, the
peers in turn. A busy machine is refused: what counts are ratios taken in one quiet run. Table, JSON and plot go to
--results.

With --windows the peers are loaded side by side and decode a few steps each in turn, so that a machine whose memory
changes its speed changes it for all of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cpu_peers import machine, models, report
from cpu_peers.beside import Beside, Turn, in_turn, table
from cpu_peers.environments import SOURCES, default_cache, interpreter, surroundings
from cpu_peers.protocol import PRECISIONS, Answer, Request, Unavailable, ask, joined
from cpu_peers.turns import WARM_UP
from cpu_peers.workload import ALL_POINTS, QUICK_POINTS, Point, parts

PEERS = ("quire", "quire_a16", "quire_server", "llama_cpp", "llama_server", "openvino", "transformers")
PLOT_REQUIREMENTS = ("matplotlib",)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures, and where things are kept."""

    models: Sequence[str]
    peers: Sequence[str]
    precisions: Sequence[str]
    points: Sequence[str]
    rounds: int
    threads: int
    cache: Path
    windows: int = 0
    steps: int = 8


def words(text: str, allowed: Sequence[str]) -> list[str]:
    """A comma-separated list of allowed words."""
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    if bad := [word for word in chosen if word not in allowed]:
        raise argparse.ArgumentTypeError(f"{bad[0]!r} is none of {', '.join(allowed)}")
    return chosen


def point_list(text: str) -> list[str]:
    """A comma-separated list of points, each checked."""
    try:
        return [str(Point.parse(word.strip())) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--models", type=lambda text: words(text, list(models.SHAPES)), help=f"of {', '.join(models.SHAPES)}")
    add("--peers", type=lambda text: words(text, PEERS), default=list(PEERS), help=f"of {', '.join(PEERS)}")
    add("--precisions", type=lambda text: words(text, PRECISIONS), default=list(PRECISIONS), help="of bf16, int4")
    add("--points", type=point_list, help="of decode:BATCH:CONTEXT, prefill:TOKENS, served:REQUESTS")
    add("--rounds", type=int, help="processes per peer and precision, of which medians are taken; 3, or 2 if quick")
    add("--threads", type=int, default=machine.cores(), help="that each peer computes with; all cores")
    add("--quick", action="store_true", help="one model, batch 1 and 8 at 64 tokens of context, prefill 512")
    add("--windows", type=int, default=0, help="of decode points, in which peers that are all loaded take turns")
    add("--steps", type=int, default=8, help="of such a window")
    add("--force", action="store_true", help="measure on a busy machine; the report says so")
    add("--prepare-only", action="store_true", help="make environments and models, and measure nothing")
    add("--cache", type=Path, default=default_cache(), help="folder of environments and models: %(default)s")
    add("--results", type=Path, default=SOURCES / "results", help="folder of table, JSON and plot")
    return result


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options mean together. Raises SystemExit for what windows cannot measure."""
    standard = QUICK_POINTS if options.quick else ALL_POINTS
    if options.windows:
        standard = tuple(point for point in standard if point.kind == "decode")
        others = [text for text in options.points or () if Point.parse(text).kind != "decode"]
        if others or options.rounds or options.windows < 2:
            raise SystemExit("--windows takes 2 or more, and goes with points of decode alone and without --rounds")
    points = options.points or [str(point) for point in standard]
    return Plan(
        models=options.models or (["qwen3-0.6b"] if options.quick else ["qwen3-0.6b", "llama-3.2-1b"]),
        peers=[peer for peer in options.peers if takes_part(peer, points)],
        precisions=options.precisions,
        points=points,
        rounds=options.rounds or (2 if options.quick else 3),
        threads=options.threads,
        cache=options.cache.absolute(),
        windows=options.windows,
        steps=options.steps,
    )


def takes_part(peer: str, points: Sequence[str]) -> bool:
    """Whether a peer has a part in any of the points; says so if not, and nothing is installed for it."""
    skips = importlib.import_module(f"cpu_peers.peers.{peer}").Peer.skips
    if any(Point.parse(point).kind not in skips for point in points):
        return True
    say(f"{peer}: has no part in these points")
    return False


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def checkpoint(name: str, cache: Path) -> Path:
    """The model's folder, made if it is missing."""
    folder = cache / "models" / name / "checkpoint"
    if not folder.exists():
        say(f"{name}: making random weights")
        partial = folder.with_suffix(".partial")
        subprocess.run([sys.executable, "-m", "cpu_peers.models", name, str(partial)], cwd=SOURCES, check=True)
        partial.rename(folder)
    return folder


def prepare(plan: Plan) -> tuple[dict[str, str], dict[tuple[str, str, str], str]]:
    """Make what is missing: returns peers' interpreters, and why (peer, model, precision) cannot be had."""
    pythons, missing = {}, {}
    cases = [(model, precision) for model in plan.models for precision in plan.precisions]
    for peer in plan.peers:
        module = importlib.import_module(f"cpu_peers.peers.{peer}")
        say(f"{peer}: environment")
        try:
            unwanted = getattr(module, "UNWANTED", ())
            pythons[peer] = interpreter(peer, module.REQUIREMENTS, module.BUILD, plan.cache, unwanted)
        except Unavailable as reason:
            missing |= {(peer, *case): str(reason) for case in cases}
            continue
        for model, precision in cases:
            say(f"{peer}: {model} in {precision}")
            answer = worker(plan, pythons[peer], peer, "prepare", model, precision, 0, plan.points)
            if "all" in answer.reasons:
                missing[peer, model, precision] = answer.reasons["all"]
    return pythons, missing


def worker(
    plan: Plan, python: str, peer: str, action: str, model: str, precision: str, seed: int, points: Sequence[str]
) -> Answer:
    """Ask a peer's worker."""
    folder = plan.cache / "models" / model / peer
    folder.mkdir(parents=True, exist_ok=True)
    request = Request(action, str(checkpoint(model, plan.cache)), str(folder), precision, points, plan.threads, seed)
    return ask([python, "-m", "cpu_peers.worker", peer], request, surroundings(plan.threads), SOURCES)


def side_by_side(plan: Plan, pythons: dict[str, str], missing: dict[tuple[str, str, str], str]) -> list[Beside]:
    """All decode points, with the peers in turn within each."""
    found = []
    for model, precision, text in itertools.product(plan.models, plan.precisions, plan.points):
        point, title = Point.parse(text), f"{model}, {precision}"
        tokens = (plan.windows + 1) * plan.steps + WARM_UP + 2
        room = str(Point("decode", point.batch, point.context + tokens))
        turns: dict[str, Turn] = {}
        try:
            for peer in plan.peers:
                if reason := missing.get((peer, model, precision)):
                    raise SystemExit(f"{peer} has no {title}: {reason}")
                folder = plan.cache / "models" / model / peer
                request = Request(
                    "measure", str(checkpoint(model, plan.cache)), str(folder), precision, (text, room), plan.threads
                )
                command = [pythons[peer], "-m", "cpu_peers.turns", peer]
                turns[peer] = Turn(command, request, surroundings(plan.threads), SOURCES)
            found.append(Beside(title, text, in_turn(turns, plan.windows, plan.steps)))
            say(f"  {title}, {text}: {', '.join(f'{peer} {r[-1]:.1f}' for peer, r in found[-1].rates.items())}")
        except Unavailable as reason:
            raise SystemExit(f"{title}, {text}: a peer {reason}") from None
        finally:
            for turn in turns.values():
                turn.close()
    return found


def limits(threads: int) -> dict[str, float]:
    """Bandwidth and matmul rate, measured now."""
    done = subprocess.run(
        [sys.executable, "-m", "cpu_peers.machine", str(threads)],
        cwd=SOURCES,
        env=surroundings(threads),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    plan: Plan, pythons: dict[str, str], missing: dict[tuple[str, str, str], str]
) -> tuple[list[report.Group], list[dict[str, float]]]:
    """All rounds; in each the limits first, then every model and precision with the peers in turn."""
    groups = {
        (model, precision): report.Group(model, precision, plan.points, {peer: [] for peer in plan.peers})
        for model in plan.models
        for precision in plan.precisions
    }
    found = []
    for turn in range(plan.rounds):
        say(f"round {turn + 1} of {plan.rounds}")
        found.append(limits(plan.threads))
        for (model, precision), group in groups.items():
            for peer in plan.peers:
                reason = missing.get((peer, model, precision))
                if reason is None:
                    answer = joined(
                        [
                            (part, worker(plan, pythons[peer], peer, "measure", model, precision, turn + 1, part))
                            for part in parts(plan.points)
                        ]
                    )
                else:
                    answer = Answer(reasons={"all": reason})
                group.answers[peer].append(answer)
                say(f"  {group.title}, {peer}: {', '.join(_words(answer))}")
    return list(groups.values()), found


def _words(answer: Answer) -> Iterator[str]:
    yield from (f"{point} {value:.1f}" for point, value in answer.figures.items())
    yield from (f"{point} not: {why}" for point, why in answer.reasons.items())


def write(plan: Plan, folder: Path, run: dict[str, object], groups: list[report.Group]) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{run['date']}-cpu-peers-{plan.threads}-threads"
    data = json.dumps({"run": run, "groups": report.record(groups)}, indent=2) + "\n"
    text = report.markdown(run, groups)
    for suffix, content in ((".json", data), (".md", text)):
        # Reasons quote errors, which may name folders of this machine.
        neutral = content.replace(str(plan.cache), "CACHE").replace(str(SOURCES.parent), ".")
        stem.with_suffix(suffix).write_text(neutral)
    print(text)
    try:
        python = interpreter("plot", PLOT_REQUIREMENTS, {}, plan.cache)
        reason = report.plot(python, groups, stem.with_suffix(".png"))
    except Unavailable as error:
        reason = str(error)
    say(f"no plot: {reason}" if reason else f"wrote {stem.name}.md, .json and .png")


def write_beside(folder: Path, run: dict[str, object], found: list[Beside]) -> None:
    """Write table and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{run['date']}-cpu-peers-{run['threads']}-threads-in-turn"
    data = {"run": run, "windows": [asdict(each) for each in found]}
    stem.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n")
    text = report.markdown(run, []) + table(found) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


def command_of(plan: Plan, forced: bool) -> str:
    """The command that measures the same, without this machine's folders."""
    parts = ["python", "benchmarks/cpu_peers.py"]
    for name in ("models", "peers", "precisions", "points"):
        parts += [f"--{name}", ",".join(getattr(plan, name))]
    counts = ("windows", "steps", "threads") if plan.windows else ("rounds", "threads")
    for name in counts:
        parts += [f"--{name}", str(getattr(plan, name))]
    return shlex.join(parts + ["--force"] * forced)


def main() -> None:
    """Prepare, refuse or measure, report."""
    options = parser().parse_args()
    plan = plan_of(options)
    pythons, missing = prepare(plan)
    if options.prepare_only:
        return
    quiet = machine.look(machine.cores())
    busy = quiet.reasons(machine.cores())
    if busy and not options.force:
        raise SystemExit(f"this machine is busy: {'; '.join(busy)}. Wait, or add --force; the report will say so.")
    beside, groups = [], []
    if plan.windows:
        found = [limits(plan.threads)]
        beside = side_by_side(plan, pythons, missing)
    else:
        groups, found = measure(plan, pythons, missing)
    after = machine.look(machine.cores())
    run = {
        "date": datetime.date.today().isoformat(),
        "command": command_of(plan, options.force),
        "machine": {"processor": machine.processor(), "cores": machine.cores()},
        "threads": plan.threads,
        "rounds": plan.windows or plan.rounds,
        "of": f"windows of {plan.steps} steps, with quartiles of their ratios" if plan.windows else "rounds",
        "forced": options.force,
        "busy": busy,
        "before": asdict(quiet),
        "after": asdict(after),
        "limits": found,
    }
    if plan.windows:
        write_beside(options.results, run, beside)
    else:
        write(plan, options.results, run, groups)


if __name__ == "__main__":
    main()
