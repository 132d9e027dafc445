"""Prints what `gpu_check.sh` has left in a folder as one table, and writes all of it to summary.json there.

python scripts/gpu_table.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRINTED = ("kernels", "quantized")
"""Parts whose own output is a table; the engine's are put together from their JSON."""


def collect(folder: Path) -> dict[str, Any]:
    """Every part that was run, with its seconds, exit code, figures, and the last line that it printed."""
    found: dict[str, Any] = {"parts": {}, "failed": _lines(folder / "failed.txt")}
    for line in _lines(folder / "parts.txt"):
        name, seconds, code = line.split()
        printed, figures = _lines(folder / f"{name}.txt"), folder / f"{name}.json"
        part = {"seconds": int(seconds), "exit code": int(code), "last line": printed[-1] if printed else ""}
        if figures.is_file():
            part["figures"] = json.loads(figures.read_text(encoding="utf-8"))
        found["parts"][name] = part
    return found


def table(folder: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """The table's text, section by section."""
    yield f"{'part':20}{'s':>6}{'code':>6}  last line"
    for name, part in found["parts"].items():
        yield f"{name:20}{part['seconds']:6}{part['exit code']:6}  {part['last line'][:120]}"
    for name in PRINTED:
        if name in found["parts"]:
            yield f"\n{name}\n" + "\n".join(_lines(folder / f"{name}.txt"))
    if found["failed"]:
        yield "\nfailed\n" + "\n".join(found["failed"])


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.is_file() else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = collect(folder)
    (folder / "summary.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join(table(folder, found)))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_engine import report

    engines: dict[str, dict[str, Any]] = {}
    for part in found["parts"].values():
        for shape, figures in part.get("figures", {}).get("shapes", {}).items():
            engines.setdefault(shape, {}).update(figures)
    print("\nengine")
    report(engines)


if __name__ == "__main__":
    main()
