"""Building: when, where, what is said without a compiler or with one that fails; other instruction sets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quire.plugin import EngineError
from quire_cpu_native import build
from quire_cpu_native.build import COMMON, FLAGS, NEEDED, SOURCES, best_isa, built, find_compiler, missing
from quire_cpu_native.native import Native

SIMDE = Path("/usr/include/simde/x86/avx512.h")
ARM_TOOLS = [path for name in ("aarch64-linux-gnu-g++", "qemu-aarch64-static") if (path := shutil.which(name))]
ARM_TOOLS = ARM_TOOLS if len(ARM_TOOLS) == 2 else []
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path))
    return tmp_path / "plugins" / "cpu_native"


def compiler(path, body):
    """A compiler in Python, in the place of the system's."""
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{body}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_reason_says_what_is_lost(monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert "cpu_ref runs, slower; install g++ or clang" in str(missing())
    with pytest.raises(EngineError, match="no C\\+\\+ compiler"):
        built()


def test_an_object_is_built_once(cache, monkeypatch, tmp_path, capsys):
    made = compiler(tmp_path / "cc", "Path(sys.argv[sys.argv.index('-o') + 1]).write_text('object')")
    monkeypatch.setattr(build, "find_compiler", lambda: made)
    first = built("generic")
    assert "building the CPU kernels for generic with cc" in capsys.readouterr().err
    assert built("generic") == first
    assert capsys.readouterr().err == ""
    assert {path.name for path in cache.iterdir()} == {first.name, first.with_suffix(".lock").name}
    assert built("avx2") != first
    compiler(made, "Path(sys.argv[sys.argv.index('-o') + 1]).write_text('other object')")
    assert built("generic") != first


def test_a_compiler_that_fails_is_reported_and_not_asked_again(cache, monkeypatch, tmp_path):
    made = compiler(tmp_path / "cc", "sys.exit('unknown flag')")
    monkeypatch.setattr(build, "find_compiler", lambda: made)
    assert missing() is None
    with pytest.raises(EngineError, match=r"could not be built: unknown flag"):
        built()
    assert "could not be built here" in str(missing())
    (report,) = cache.glob("*.failed.txt")
    report.unlink()
    assert missing() is None


@pytest.fixture
def carried(monkeypatch, tmp_path):
    """What a wheel carries: here a copy of what was compiled for this machine."""
    made = built()
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "CARRIED", tmp_path / "objects")
    build.CARRIED.mkdir()
    path = build.CARRIED / build._named(best_isa(), build.SELF_CONTAINED)
    shutil.copy(made, path)
    return path


@needs_compiler
def test_objects_of_a_wheel_are_taken_where_there_is_no_compiler(carried, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert missing() is None
    assert built() == carried
    changed = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, changed)
    (changed / "simd.h").write_text("other")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert "no C++ compiler" in str(missing())


@needs_compiler
def test_an_object_that_this_system_cannot_load_is_as_if_it_were_not_there(carried, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    carried.unlink()
    carried.write_bytes(b"for another system")
    assert "no C++ compiler" in str(missing())


@pytest.mark.slow
@needs_compiler
def test_the_command_makes_objects_that_work(monkeypatch, tmp_path):
    build.main([best_isa(), "--out", str(tmp_path)])
    monkeypatch.setattr(build, "CARRIED", tmp_path)
    (path,) = tmp_path.iterdir()
    assert built() == path
    x, out = torch.randn(1, 6), torch.empty(1, 3)
    Native(path, 2).function("gated_act", torch.float32)(x.data_ptr(), 6, out.data_ptr(), 1, 3, 0)
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :3]) * x[:, 3:])


def test_the_command_makes_one_object_for_each_set_and_removes_older_ones(monkeypatch, tmp_path):
    made = tmp_path / "cc"
    made.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho object > "$2"\n')
    made.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: made)
    out = tmp_path / "out"
    out.mkdir()
    (out / "avx2-0.so").write_text("older")
    sets = {"x86_64": {"avx512bf16", "avx512", "avx2", "generic"}, "arm64": {"neondot", "neon"}, "riscv64": {"generic"}}
    for machine, isas in sets.items():
        monkeypatch.setattr(build.platform, "machine", lambda machine=machine: machine)
        build.main(["--out", str(out)])
        assert {path.name.partition("-")[0] for path in out.iterdir()} == isas
        assert not (out / "avx2-0.so").exists()
    with pytest.raises(SystemExit):
        build.main(["avx3", "--out", str(out)])


def test_the_best_instructions_that_a_processor_has(monkeypatch):
    for isa, needed in NEEDED.items():
        monkeypatch.setattr(build.platform, "machine", lambda arm="asimd" in needed: "aarch64" if arm else "x86_64")
        more = NEEDED["avx2"] if isa.startswith("avx") else frozenset()
        monkeypatch.setattr(build, "_processor_flags", lambda flags=needed | more: flags)
        assert best_isa() == isa
    monkeypatch.setattr(build, "_processor_flags", frozenset)  # where there is no /proc
    for machine, isa in {"arm64": "neon", "x86_64": "generic", "riscv64": "generic"}.items():
        monkeypatch.setattr(build.platform, "machine", lambda machine=machine: machine)
        assert best_isa() == isa
    assert set(FLAGS) == set(NEEDED)


ON_ANOTHER_PATH = """
import sys
from quire_cpu_native import build

path = build.built({isa!r}, {flags!r})
build.built = lambda: path
sys.path.insert(0, {folder!r})
from test_attention import *
from test_kernels import *
from test_kits import *
from test_sampler import *
"""
"""The other files of this folder, with the kernels built in another way."""


def run_tests(folder, isa, flags, **environment):
    file = folder / "test_another_path.py"
    file.write_text(ON_ANOTHER_PATH.format(isa=isa, flags=flags, folder=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", os.devnull, str(file)]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_compiler
def test_the_portable_path_passes_the_tests(tmp_path):
    answer = run_tests(tmp_path, "generic", ())
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-1000:]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not SIMDE.exists(), reason="SIMDe is not installed (Debian: libsimde-dev)")
@pytest.mark.skipif(best_isa() == "generic", reason="what SIMDe does not emulate takes AVX2")
@pytest.mark.parametrize("isa", ["avx512", "avx512bf16"])
def test_avx512_passes_the_tests_in_portable_c(tmp_path, isa):
    """The same source, with every intrinsic emulated: right results, no word on speed."""
    flags = ("-UQUIRE_ISA_AVX2", f"-DQUIRE_ISA_{isa.upper()}", "-DQUIRE_SIMDE", "-w", "-O2")
    answer = run_tests(tmp_path, "avx2", flags)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-1000:]


def outputs_of_every_kernel(folder, compiler, isa, flags=(), emulator=()):
    """What `every_kernel.cpp` writes, built for an instruction set."""
    program = folder / isa
    sources = [str(Path(__file__).with_name("every_kernel.cpp")), *map(str, sorted(SOURCES.glob("*.cpp")))]
    command = [compiler, *COMMON, *FLAGS[isa], *flags, f"-DQUIRE_ISA_{isa.upper()}"]
    subprocess.run([*command, f"-I{SOURCES}", *sources, "-o", str(program)], check=True)
    return subprocess.run([*emulator, str(program)], check=True, capture_output=True).stdout


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not ARM_TOOLS, reason="Debian: g++-aarch64-linux-gnu and qemu-user-static are not installed")
@pytest.mark.skipif(not NEEDED["avx2"] <= build._processor_flags(), reason="it is compared with AVX2")
@pytest.mark.parametrize("isa", ["neon", "neondot"])
def test_neon_has_the_bits_of_avx2(tmp_path, isa):
    """Every kernel, in an emulator: both have vectors of eight lanes, so that sums are taken in one order."""
    compiler, emulator = ARM_TOOLS
    expected = outputs_of_every_kernel(tmp_path, str(find_compiler()), "avx2")
    assert len(expected) > 6_000_000
    assert outputs_of_every_kernel(tmp_path, compiler, isa, ("-static",), (emulator,)) == expected


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' library is preloaded as on Linux")
def test_sanitizers_find_nothing(tmp_path):
    """Addresses and undefined behaviour."""
    compiler = str(find_compiler())
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-fno-omit-frame-pointer")
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    answer = run_tests(tmp_path, best_isa(), flags, **environment)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
