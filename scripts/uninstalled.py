"""Lets a checkout run where nothing can be installed: writes what plugins are found by, and says what is missing.

    export PYTHONPATH=$(python3 scripts/uninstalled.py FOLDER)

FOLDER gets the metadata that an installation would have written, for plugins are found by their entry points. The
printed path is that folder, and the folders of the packages. Exit code 2 if a requirement is not there: bring its
wheel along, unpack it anywhere, and put that folder on PYTHONPATH beforehand. Another version is only warned of.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def unmet(requirements: Iterable[str]) -> tuple[list[str], list[str]]:
    """(requirements that this Python lacks, those of which it has another version)."""
    absent, other = [], []
    for text in requirements:
        requirement = Requirement(text)
        try:
            has = version(requirement.name)
        except PackageNotFoundError:
            absent.append(text)
            continue
        if not requirement.specifier.contains(has, prereleases=True):
            other.append(f"{text} (there is {has})")
    return absent, other


def write_metadata(project: dict[str, Any], folder: Path) -> None:
    """What an installation would have written, as far as Quire reads it."""
    scope: dict[str, str] = {}
    exec((ROOT / "framework/quire/version.py").read_text(encoding="utf-8"), scope)
    name, number = project["name"], scope["__version__"]
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    absent, other = unmet(settings["project"]["dependencies"])
    if other:
        print(f"warning: other versions than are asked for: {'; '.join(other)}", file=sys.stderr)
    if absent:
        print(f"{sys.executable} lacks: {'; '.join(absent)}", file=sys.stderr)
        return 2
    write_metadata(settings["project"], folder)
    packages = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    roots = dict.fromkeys(str((ROOT / package).parent) for package in packages)
    print(os.pathsep.join([str(folder), *roots]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
