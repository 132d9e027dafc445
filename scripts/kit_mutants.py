"""Holds the conformance kit against plugins that are wrong in one way each: every one must be found.

    python scripts/kit_mutants.py [--only TEXT] [--json]

Prints, for each fault of `kit_faults`, the check that found it and the seconds that this took from the
fault's first check on. `--only` takes the faults whose name or point contains one of the texts. Exit code 1 if
one survives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from kit_faults.table import FAULTS

CASES = Path(__file__).parent / "kit_faults" / "cases.py"


@dataclass(slots=True)
class Outcome:
    """What the kit said of one fault; `killed_by` is empty if it found nothing."""

    name: str
    point: str
    killed_by: str = ""
    seconds: float = 0.0


class FirstFailure:
    """Runs each class until its first failure, and notes it."""

    def __init__(self, wanted: dict[str, Outcome]) -> None:
        self.outcomes = wanted
        self._started: dict[str, float] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        items[:] = [item for item in items if item.cls.__name__ in self.outcomes]

    def pytest_runtest_setup(self, item: Any) -> None:
        self._started.setdefault(item.cls.__name__, time.perf_counter())
        if self.outcomes[item.cls.__name__].killed_by:
            pytest.skip("killed")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        outcome = self.outcomes[item.cls.__name__]
        if report.failed and not outcome.killed_by:
            outcome.killed_by = item.name
            outcome.seconds = time.perf_counter() - self._started[item.cls.__name__]
        return report


def run(texts: list[str]) -> list[Outcome]:
    """The outcome of each chosen fault. Raises SystemExit if pytest could not run."""
    chosen = {
        f"TestFault{number:03}": Outcome(fault.name, fault.point)
        for number, fault in enumerate(FAULTS)
        if not texts or any(text in fault.name or text in fault.point for text in texts)
    }
    arguments = [str(CASES), "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(CASES.parent)]
    arguments += ["-o", "python_files=cases.py", "--import-mode=importlib"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(arguments, plugins=[FirstFailure(chosen)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest could not run:\n{said.getvalue()[-3000:]}")
    return list(chosen.values())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name or point contains one of these")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    chosen = parser.parse_args()
    outcomes = run(chosen.only)
    survived = sum(not outcome.killed_by for outcome in outcomes)
    if chosen.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        for outcome in outcomes:
            found = f"{outcome.seconds:6.2f} s  {outcome.killed_by}" if outcome.killed_by else "         SURVIVED"
            print(f"{outcome.point:17} {outcome.name:46} {found}")
        print(f"{len(outcomes) - survived} killed, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
