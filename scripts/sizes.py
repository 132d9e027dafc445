"""Prints how large the code is: lines per folder, the longest files and the longest functions.

python scripts/sizes.py            the table
python scripts/sizes.py --long     also every file over 300 lines
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("framework", "plugins", "server", "scripts", "benchmarks", "examples", "tests")
LONG_FILE = 300
"""A file that passes this many lines wants splitting."""

LONG_FUNCTION = 80
"""No function outside the tests may pass this many lines."""


@dataclass(frozen=True)
class Function:
    """A function or method, decorators and docstring included."""

    file: Path
    name: str
    lines: int


def python_files(*folders: str) -> list[Path]:
    """Python files below these folders of the repository, in order."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def num_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[Function]:
    """Every function in a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield Function(path, node.name, (node.end_lineno or node.lineno) - first + 1)


def packages() -> list[tuple[str, list[Path]]]:
    """Folders that get a line of their own: packages of the core, plugins, and the other roots."""
    rows = []
    core = ROOT / "framework" / "quire"
    rows.append(("framework/quire (files)", sorted(core.glob("*.py"))))
    for folder in sorted(path for path in core.iterdir() if path.is_dir() and list(path.rglob("*.py"))):
        rows.append((f"framework/quire/{folder.name}", python_files(str(folder.relative_to(ROOT)))))
    for plugin in sorted((ROOT / "plugins").iterdir()):
        rows.append((f"plugins/{plugin.name}", python_files(f"plugins/{plugin.name}")))
    rows += [(name, python_files(name)) for name in FOLDERS[2:]]
    return [(name, files) for name, files in rows if files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help=f"list every file over {LONG_FILE} lines")
    arguments = parser.parse_args()
    print(f"{'folder':<30}{'files':>7}{'lines':>8}{'longest':>9}")
    for name, files in packages():
        sizes = [num_lines(path) for path in files]
        print(f"{name:<30}{len(files):>7}{sum(sizes):>8,}{max(sizes):>9}")
    code = python_files("framework", "plugins", "server")
    tests = sum(num_lines(path) for path in python_files("tests"))
    total = sum(num_lines(path) for path in code)
    print(f"\ncode {total:,} lines, tests {tests:,}: {tests / max(1, total):.2f} lines of test per line of code")
    found = sorted((function for path in code for function in functions(path)), key=lambda item: -item.lines)
    lengths = [function.lines for function in found]
    print(f"functions: median {median(lengths):.0f}, p95 {quantiles(lengths, n=20)[-1]:.0f}, longest {lengths[0]}")
    for function in found[:5]:
        print(f"  {function.lines:>4}  {function.file.relative_to(ROOT)}:{function.name}")
    long = [(num_lines(path), path.relative_to(ROOT)) for path in code if num_lines(path) > LONG_FILE]
    print(f"files over {LONG_FILE} lines: {len(long)}")
    for size, path in sorted(long, reverse=True)[: None if arguments.long else 5]:
        print(f"  {size:>4}  {path}")


if __name__ == "__main__":
    main()
