"""Writes docs/reference and docs/plugins/reference from the code, so that the pages cannot be wrong.

python scripts/reference.py            write the pages
python scripts/reference.py --check    exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from point_pages import point_pages
from quire.config import SPECIAL_VARIABLES, EngineConfig, environment_variable, field_path
from quire.config_values import describe
from quire.contract.provider import POINTS, Provider
from quire.facade import EngineFacade, HostInfo
from quire.hooks import HOOK_NAMES, HookSpecs

FOLDER = Path(__file__).resolve().parents[1] / "docs"
NOTICE = "<!-- Written by scripts/reference.py; change the code, then run `make fix`. -->\n"

CONFIG = """# Configuration

Every field can be set in four places. The strongest wins: keyword arguments of `LLM` and flags of the
program, then environment variables, then a YAML or TOML file (`quire --config FILE ...`), then what
plugins suggest; what is still open has its default. `quire config show` prints every value with the place
it came from, `quire config init` a file to start from, `quire config schema` a JSON schema for editors.

Numbers may carry a unit: `8k` is 8,000, `8Ki` is 8,192, `2GiB` is 2,147,483,648. Lists are written
`a,b` in flags and variables. One key of a mapping is set by a flag such as `--ops rms_norm=torch` or
`--plugin-options cpu_native.threads=4`, and by a variable such as `QUIRE_PLUGINS__OPS__RMS_NORM=torch`.
An unknown key, flag or `QUIRE_` variable is an error.

A provider's options stand under its name, or under `point.name` or `plugin:name` where the name alone is
not clear.
"""

HOOKS = """# Hooks

A plugin is a module, or an object, whose functions carry `@hookimpl` from `quire.plugin`. It is found by an
entry point of group `quire`, or loaded from one file by `quire --plugin FILE`. Arguments are opt-in by
name: a hook may leave out those that it does not need. Hooks run at start-up, or observe; none runs per token.

Each plugin is loaded alone. One that fails to import, misspells a hook, raises, or was written for another
API version is left out with a warning that names it, and `quire plugins list` shows its status and the
reason; `--strict-plugins` makes that an error, `-p no:NAME` leaves a plugin out.
An observer that raises three times is not called any more.
"""

POINTS_PAGE = """# Extension points

What a provider can implement. The API version is raised when the contract changes; the host serves the
versions in the table. A stable point changes only with a new version and two minor releases of warning.
"""


def config_page() -> str:
    """Every field of `EngineConfig`."""
    parts = [CONFIG]
    for name, field in EngineConfig.model_fields.items():
        default = "null" if field.default is None else repr(field.default).replace("'", "")
        parts.append(
            f"## {name}\n\n{field.description}\n\n"
            f"* File: `{field_path(name)}`\n"
            f"* Environment: `{environment_variable(name)}`\n"
            f"* Flag: `--{name.replace('_', '-')}`\n"
            f"* Allowed: {describe(field)}\n"
            f"* Default: `{default}`\n"
        )
    meanings = {
        "QUIRE_LOG_LEVEL": "how much the program logs: debug, info, warning, error or critical.",
        "QUIRE_PLUGINS": "the list of allowed plugins, as `plugins.allowed`.",
        "QUIRE_CACHE_DIR": "folder of downloaded models, instead of the hub's own.",
    }
    lines = [f"* `{name}`: {meanings[name]}\n" for name in SPECIAL_VARIABLES]
    parts.append("## Variables that are no field\n\n" + "".join(lines))
    return NOTICE + "\n".join(parts)


def hooks_page() -> str:
    """Every hook with its signature, and what it is given."""
    parts = [HOOKS]
    for name in sorted(HOOK_NAMES):
        function = getattr(HookSpecs, name)
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
        shown = str(signature.replace(parameters=own)).replace("'", "")
        parts.append(f"## {name}\n\n```python\n@hookimpl\ndef {name}{shown}: ...\n```\n\n{inspect.getdoc(function)}\n")
    for cls in (Provider, HostInfo, EngineFacade):
        parts.append(f"## {cls.__name__}\n\n```text\n{inspect.getdoc(cls)}\n```\n")
    return NOTICE + "\n".join(parts)


def points_page() -> str:
    """Every extension point."""
    rows = ["| point | decides | base class | API | tier |\n|---|---|---|---|---|\n"]
    for point in POINTS.values():
        served = f"{point.current}" if point.oldest == point.current else f"{point.oldest} to {point.current}"
        base = point.base.replace(":", ".")
        link = f"[`{point.name}`](../plugins/reference/{point.name}.md)"
        rows.append(f"| {link} | {point.summary} | `{base}` | {served} | {point.tier} |\n")
    return NOTICE + POINTS_PAGE + "\n" + "".join(rows)


def pages() -> dict[str, str]:
    """File name below docs -> content."""
    own = {"config.md": config_page(), "hooks.md": hooks_page(), "points.md": points_page()}
    return {f"reference/{name}": text for name, text in own.items()} | {
        name: NOTICE + text for name, text in point_pages().items()
    }


def stale(folder: Path = FOLDER) -> list[str]:
    """Names of pages that differ from what the code says."""
    return [
        name
        for name, text in pages().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    if parser.parse_args().check:
        for name in stale():
            print(f"docs/{name} is out of date; run python scripts/reference.py")
        sys.exit(bool(stale()))
    for name, text in pages().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
