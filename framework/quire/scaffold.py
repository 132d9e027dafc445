"""Writes a plugin's repository from the templates in `assets/plugin_templates`: what `quire plugins new` does.

`common` and one folder per extension point hold the files, the point's standing over the common ones of the
same path. In a path, `package` is the plugin's import package, `dot_` a leading dot, and `.template` is
dropped; in a text, `@word@` is one of the words of `PluginName`. Templates are plain text: nothing in them
is evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from quire.contract.provider import POINTS
from quire.errors import ConfigError
from quire.host.loading import RESERVED_NAMES
from quire.host.sources import CORE
from quire.host.suggest import suggest
from quire.version import __version__

TEMPLATES = Path(__file__).parent / "assets" / "plugin_templates"
COMMON, LICENSE_TEXTS = "common", "licenses"
SUFFIX = ".template"
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
MAX_NAME = 40
WORD = re.compile(r"@([a-z_]+)@")


def points() -> list[str]:
    """The extension points that have a template."""
    return [point for point in POINTS if (TEMPLATES / point).is_dir()]


def licenses() -> list[str]:
    """SPDX names of the licenses that a plugin can be given."""
    return sorted(path.name.removesuffix(SUFFIX) for path in (TEMPLATES / LICENSE_TEXTS).iterdir())


@dataclass(frozen=True, slots=True)
class PluginName:
    """A valid name, such as `fast-window`, and what is made of it.

    Raises:
        ConfigError: the name is not allowed; says what is.
    """

    name: str

    def __post_init__(self) -> None:
        example = "such as mine or fast-window"
        if not NAME.fullmatch(self.name) or len(self.name) > MAX_NAME:
            raise ConfigError(
                f"{self.name!r} cannot be a plugin's name",
                remedy=f"use at most {MAX_NAME} small letters and digits, words joined by '-' or '_', {example}",
            )
        if self.name in RESERVED_NAMES or self.name == CORE:
            raise ConfigError(f"the name {self.name!r} is taken by Quire itself", remedy=f"use another one, {example}")

    @property
    def distribution(self) -> str:
        """What is installed: `quire-fast-window`."""
        return "quire-" + self.name.replace("_", "-")

    @property
    def package(self) -> str:
        """What is imported: `quire_fast_window`."""
        return "quire_" + self.name.replace("-", "_")

    @property
    def prefix(self) -> str:
        """What class names begin with: `MyAttention`."""
        return "".join(word.capitalize() for word in re.split("[-_]", self.name))


def new_plugin(point: str, name: str, folder: Path | None, *, license: str, holder: str, year: int) -> list[Path]:
    """Write a plugin's repository; returns the files.

    Args:
        point: the extension point that it serves.
        name: of plugin and provider.
        folder: where to; None: the distribution's name, in the current folder.
        license: one of `licenses()`. holder, year: for its copyright line.

    Raises:
        ConfigError: one of these is not allowed, or the folder has something in it. Nothing is written then.
    """
    if point not in points():
        known = "an extension point without a template" if point in POINTS else "not an extension point"
        remedy = f"templates are there for {', '.join(points())}" if point in POINTS else suggest(point, points())
        raise ConfigError(f"{point!r} is {known}", remedy=remedy)
    if license not in licenses():
        raise ConfigError(f"there is no license text {license!r}", remedy=f"use one of {', '.join(licenses())}")
    names = PluginName(name)
    if find_spec(names.package) is not None:
        raise ConfigError(
            f"a package called {names.package!r} is installed already", remedy="choose another name, or uninstall it"
        )
    root = Path(names.distribution) if folder is None else folder
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{str(root)!r} is there already, and not empty", remedy="name another folder with --dir")
    words = {"point": point, "license": license, "holder": holder, "year": str(year)}
    files = {root / path: text for path, text in render(names, words).items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sorted(files)


def render(names: PluginName, words: dict[str, str]) -> dict[PurePosixPath, str]:
    """Path in the repository -> text. `words` has at least point, license, holder and year."""
    words = words | {
        "name": names.name,
        "distribution": names.distribution,
        "package": names.package,
        "class": names.prefix,
        "quire_version": __version__,
    }
    files = {PurePosixPath("LICENSE"): TEMPLATES / LICENSE_TEXTS / (words["license"] + SUFFIX)}
    for folder in (TEMPLATES / COMMON, TEMPLATES / words["point"]):
        files |= {_path(file.relative_to(folder), names): file for file in folder.rglob(f"*{SUFFIX}")}
    return {path: WORD.sub(lambda found: words[found[1]], file.read_text("utf-8")) for path, file in files.items()}


def _path(template: Path, names: PluginName) -> PurePosixPath:
    def part(text: str) -> str:
        text = names.package if text == "package" else text.removesuffix(SUFFIX)
        return f".{text.removeprefix('dot_')}" if text.startswith("dot_") else text

    return PurePosixPath(*map(part, template.parts))
