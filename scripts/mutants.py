"""Seeds each fault of `mutant_table` into a copy of the tree and shows that the tests notice it.

    python scripts/mutants.py [--only TEXT] [--limit SECONDS]

Exit code 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("framework", "plugins", "server", "tests", "scripts", "pyproject.toml")
LIMIT_S = 150
"""A fault that makes the tests hang for so long has been noticed. It must be more than they take without one."""
SURVIVED = "SURVIVED"
PACKAGES = ("framework", "plugins/cpu_native", "plugins/cpu_ref", "plugins/cuda_paged", "plugins/quant", "server")


def verdict(mutant: Mutant, tree: Path, limit_s: int) -> str:
    """What the mutant's tests make of a tree that has the fault: `killed`, `hangs` or `SURVIVED`."""
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: its text occurs {original.count(mutant.old)} times in {mutant.file}, not once"
        )
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        paths = os.pathsep.join(str(tree / package) for package in PACKAGES)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", mutant.tests]
        answer = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        path.write_text(original, encoding="utf-8")
    if answer.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest could not run:\n{answer.stdout.decode()[-2000:]}")
    return "killed" if answer.returncode == 1 else SURVIVED


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this text")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds after which tests hang")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for entry in COPIED:
            source = ROOT / entry
            if source.is_dir():
                shutil.copytree(source, tree / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / entry)
        for index, mutant in enumerate(chosen, start=1):
            found = verdict(mutant, tree, arguments.limit)
            survivors += found == SURVIVED
            print(f"{index:3}/{len(chosen)}  {found:9} {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} killed, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
