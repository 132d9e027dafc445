"""`quire check`: what a bug report should say about this machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from quire.cli.console import print_table
from quire.cli.session import Session, open_session
from quire.contract.device import DeviceInit
from quire.errors import QuireError
from quire.loader.checkpoint import BUNDLED, bundled_folder
from quire.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pydantic", "triton", "fastapi")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(check)


def check(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False
) -> None:
    """Report versions, processor, memory, plugins and models. Says what is missing and how to get it."""
    session = open_session(context, {})
    rows = [*_software(), *_machine(), *_plugins(session), *_devices(session), *_models()]
    if as_json:
        typer.echo(json.dumps(dict(rows), indent=2))
    else:
        print_table(("WHAT", "FOUND"), rows)


def _software() -> list[tuple[str, str]]:
    rows = [("quire", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _machine() -> list[tuple[str, str]]:
    import torch

    rows = [
        ("cpus", f"{os.cpu_count()}, of which {_usable_cpus()} may be used"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.is_file():
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
        rows.append(("cpu flags", ", ".join(flag for flag in CPU_FLAGS if flag in words) or "none of interest"))
    if meminfo.is_file():
        pairs = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
        sizes = {words[0].rstrip(":"): int(words[1]) for words in pairs if len(words) > 1}
        total, free = sizes.get("MemTotal", 0) / 2**20, sizes.get("MemAvailable", 0) / 2**20
        rows.append(("memory", f"{total:.1f} GiB, {free:.1f} GiB available"))
    return rows


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _plugins(session: Session) -> list[tuple[str, str]]:
    return [
        (f"plugin {report.name}", f"{report.status}{f': {report.reason}' if report.reason else ''}")
        for report in session.host.reports.values()
    ]


def _devices(session: Session) -> list[tuple[str, str]]:
    rows = []
    for item in session.host.explain("device"):
        found = "; ".join(item.reasons)
        if not found:
            options = session.host.options_for(item.provider, session.configured.config.plugin_options)
            target = session.host.load("device", f"{item.plugin}:{item.provider.name}")
            try:
                memory = target(DeviceInit(options=options)).memory()
                found = f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
            except (QuireError, RuntimeError, OSError) as error:
                found = f"failed: {error}"
        rows.append((f"device {item.provider.name}", found))
    return rows


def _models() -> list[tuple[str, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = bundled_folder()
    bundled = str(folder) if (folder / "config.json").is_file() else "missing; reinstall quire"
    return [(f"model {BUNDLED}", bundled), ("hub cache", str(HF_HUB_CACHE)), ("executable", sys.executable)]
