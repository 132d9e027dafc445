"""Compiles the kernels once for this machine's instructions, and keeps them in Quire's cache.

The objects are plain C functions on pointers: they link neither Python nor torch, and serve every version of both.
So a wheel can carry them: `python -m quire_cpu_native.build` puts them into the package before the wheel is made.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from quire.plugin import EngineError, cache_folder

SOURCES = Path(__file__).parent / "csrc"
CARRIED = Path(__file__).parent / "objects"
"""Objects that the wheel carries."""
SELF_CONTAINED = ("-static-libstdc++", "-static-libgcc")
"""Flags of objects for other machines, whose C++ library may be older."""
COMPILERS = ("c++", "g++", "clang++")
# No contraction: what is a fused multiply-add and what is not must not depend on the compiler's mood. Nobody reads the
# flags of floating-point exceptions, for whose sake no vectors would be made of loops that compare.
COMMON = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "avx512bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
        "avx512": AVX512,
        "avx2": AVX2,
        "neondot": ("-march=armv8.2-a+dotprod",),
        "neon": (),
        "generic": (),
    }
)
"""Instruction set -> the compiler's flags, best first."""
NEEDED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "avx512bf16": frozenset({"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}),
        "avx2": frozenset({"avx2", "fma", "f16c"}),
        "neondot": frozenset({"asimd", "asimddp"}),
        "neon": frozenset({"asimd"}),
        "generic": frozenset(),
    }
)
"""Instruction set -> the flags of the processor that it takes, in Linux's names."""
BASIC: Mapping[str, frozenset[str]] = MappingProxyType(
    dict.fromkeys(("aarch64", "arm64"), NEEDED["neon"]) | dict.fromkeys(("x86_64", "amd64"), NEEDED["generic"])
)
"""Machine -> the flags that every such processor has; on others kernels are written for nothing but portable C++."""


def missing() -> str | None:
    """None if the kernels can run here, else the reason why not. Cheap: `quire plugins list` asks it."""
    if sys.platform == "win32":
        return "its kernels are built for Linux and macOS only; cpu_ref runs instead, slower"
    if carried(best_isa()):
        return None
    compiler = find_compiler()
    if compiler is None:
        return "there is no C++ compiler to build its kernels with, so cpu_ref runs, slower; install g++ or clang"
    report = _report(_target(compiler, best_isa()))
    if report.exists():
        return f"its kernels could not be built here, see {report}; delete that file to try again"
    return None


def find_compiler() -> Path | None:
    """The system's C++ compiler."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return Path(found).resolve() if found else None


def best_isa() -> str:
    """The best instruction set that this processor has."""
    basic = BASIC.get(platform.machine().lower())
    if basic is None:
        return "generic"
    flags = basic | _processor_flags()
    return next(isa for isa, needed in NEEDED.items() if needed <= flags)


def _processor_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def carried(isa: str) -> Path | None:
    """The wheel's object for an instruction set, if there is one of these very sources and flags that loads here."""
    path = CARRIED / _named(isa, SELF_CONTAINED)
    return path if path.exists() and _loads(path) else None


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:  # for another system, or an older one than it was built on
        return False
    return True


def built(isa: str | None = None, extra: Sequence[str] = ()) -> Path:
    """The shared object for an instruction set: the wheel's, or one that is compiled now if it is not in the cache.

    Args:
        isa: a key of `FLAGS`; None: the best that this machine has. extra: further flags, for tests.

    Raises:
        EngineError: there is no compiler, or it failed.
    """
    isa = isa or best_isa()
    ready = None if extra else carried(isa)
    if ready is not None:
        return ready
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("cpu_native has no C++ compiler", remedy="install g++ or clang, or choose cpu_ref")
    target = _target(compiler, isa, extra)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.exists():
                sys.stderr.write(f"building the CPU kernels for {isa} with {compiler.name}, once\n")
                _build(compiler, isa, extra, target)
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process builds, others that want the same wait for it."""
    import fcntl  # not on Windows, where nothing is built

    with target.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _target(compiler: Path, isa: str, extra: Sequence[str] = ()) -> Path:
    """Where an object lies that is compiled here."""
    stat = compiler.stat()
    made_by = (str(compiler), str(stat.st_size), str(stat.st_mtime_ns))
    return cache_folder("cpu_native") / _named(isa, (*extra, *made_by))


def _named(isa: str, parts: Sequence[str]) -> str:
    """A file's name after everything that it is made from: sources, flags, and `parts`."""
    digest = hashlib.sha256()
    for part in (isa, *COMMON, *FLAGS[isa], *parts):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{isa}-{digest.hexdigest()[:16]}.so"


def _report(target: Path) -> Path:
    """What the compiler said when it failed."""
    return target.with_suffix(".failed.txt")


def _build(compiler: Path, isa: str, extra: Sequence[str], target: Path) -> None:
    """Compile each source beside the others, link, and move the result into place in one step."""
    flags = [*COMMON, *FLAGS[isa], f"-DQUIRE_ISA_{isa.upper()}", *extra]
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        compiles = [
            [str(compiler), *flags, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            answers = list(pool.map(_run, compiles))
        whole = folder / target.name
        answers.append(_run([str(compiler), *flags, "-shared", *objects, "-o", str(whole)]))
        if not whole.exists():
            words = "\n".join(answers).strip()
            _report(target).write_text(words + "\n", encoding="utf-8")
            raise EngineError(
                f"cpu_native's kernels could not be built: {words[:500]}",
                remedy="the next start runs without them (cpu_ref); use another compiler to have them",
            )
        os.replace(whole, target)  # two processes that build at once leave one whole file


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def _of_this_machine() -> list[str]:
    """Instruction sets that processors of this machine's kind have, or may have."""
    basic = BASIC.get(platform.machine().lower())
    if basic is None:
        return ["generic"]
    return [isa for isa in FLAGS if isa.startswith("neon") == (basic == NEEDED["neon"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Put objects where a wheel takes them from. Raises EngineError without a compiler, or if it fails."""
    isas = _of_this_machine()
    parser = argparse.ArgumentParser(prog="python -m quire_cpu_native.build", description=main.__doc__)
    parser.add_argument("isas", nargs="*", metavar="ISA", help=f"of {', '.join(isas)}; all of them", default=isas)
    parser.add_argument("--out", type=Path, default=CARRIED, help="folder: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := [isa for isa in options.isas if isa not in isas]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(isas)}")
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("cpu_native has no C++ compiler", remedy="install g++ or clang")
    options.out.mkdir(parents=True, exist_ok=True)
    for earlier in options.out.glob("*.so"):
        earlier.unlink()
    for isa in options.isas:
        target = options.out / _named(isa, SELF_CONTAINED)
        _build(compiler, isa, SELF_CONTAINED, target)
        sys.stdout.write(f"{target}\n")


if __name__ == "__main__":
    main()
