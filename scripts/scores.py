"""Certifies every provider of Quire's own that this machine can run, and writes the table of the README.

    python scripts/scores.py            print the table
    python scripts/scores.py --update   write it into README.md

A provider that needs a device which is not here is left out. Exit code 1 if a provider fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from quire.contract.provider import POINTS, Provider
from quire.registry import PluginHost, build_host
from quire.testing.certify import Score

README = Path(__file__).resolve().parents[1] / "README.md"
OWN = ("core", "cpu_native", "cpu_ref", "quant", "server")
"""Our plugins that a machine without a GPU can run."""
HEAD = "| Extension point | Providers | Verdict | Checks |\n|---|---|---|---:|\n"


def runnable(host: PluginHost) -> list[tuple[Provider, str]]:
    """Providers of our own plugins, with the plugin's name, that can run on a CPU."""
    return [
        (provider, plugin)
        for point in POINTS
        for provider, plugin in host.providers(point)
        if plugin in OWN and not host.availability(provider) and provider.devices <= {"cpu"}
    ]


def certify(providers: Sequence[tuple[Provider, str]]) -> list[Score]:
    """Their scores, from one run of pytest over all of their kits."""
    lines = ["from quire.testing.certify import conformance", ""]
    for number, (provider, plugin) in enumerate(providers):
        lines.append(f"Test{number:03} = conformance({provider.point!r}, '{plugin}:{provider.name}')")
        lines.append(f"Test{number:03}.__name__ = 'Test{number:03}'")
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "test_all.py", Path(folder) / "report.xml"
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
        command += ["--rootdir", folder, f"--junitxml={report}"]
        subprocess.run(command, cwd=folder, check=False, stdout=sys.stderr)
        counts = {number: [0, 0] for number in range(len(providers))}
        for case in ElementTree.parse(report).iter("testcase"):
            number = int(case.get("classname", "")[-3:])
            failed = case.find("failure") is not None or case.find("error") is not None
            counts[number][failed] += failed or case.find("skipped") is None
    return [
        Score(each.point, each.name, plugin, "certified" if passed and not failed else "failed", passed, failed)
        for (each, plugin), (passed, failed) in zip(providers, counts.values(), strict=True)
    ]


def table(scores: Iterable[Score]) -> str:
    """Markdown: one line for the providers of a point that ended alike."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for score in scores:
        groups.setdefault((score.point, score.verdict, score.passed), []).append(f"`{score.name}`")
    lines = [
        f"| {point} | {', '.join(names)} | {verdict} | {passed}{' each' if len(names) > 1 else ''} |\n"
        for (point, verdict, passed), names in groups.items()
    ]
    return HEAD + "".join(lines)


def rows(text: str) -> set[tuple[str, str, str]]:
    """(point, provider, verdict) of each provider in the README's table."""
    body = text.partition(HEAD)[2].partition("\n\n")[0]
    return {
        (point.strip(), name, verdict.strip())
        for _, point, names, verdict, *_ in (line.split("|") for line in body.splitlines())
        for name in re.findall(r"`([^`]+)`", names)
    }


def with_table(text: str, new: str) -> str:
    """The README with its table replaced."""
    before, head, rest = text.partition(HEAD)
    if not head:
        raise SystemExit("README.md has no table of scores; its head is HEAD of this script")
    return before + new + "\n" + rest.partition("\n\n")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table into README.md")
    chosen = parser.parse_args(arguments)
    scores = certify(runnable(build_host()))
    if chosen.update:
        README.write_text(with_table(README.read_text(encoding="utf-8"), table(scores)), encoding="utf-8")
    else:
        print(table(scores), end="")
    return 1 if any(score.verdict != "certified" for score in scores) else 0


if __name__ == "__main__":
    sys.exit(main())
