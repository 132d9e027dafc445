"""Every shipped launch compiles for every GPU generation, fits into it, and uses its tensor cores.

In a process of its own: here Triton interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_check.py"


@pytest.mark.parametrize(
    ("arch", "options"),
    [(90, ["--quick"]), *(pytest.param(arch, [], marks=pytest.mark.kernels) for arch in (80, 86, 90, 100, 120))],
)
def test_launches_compile(arch, options, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    answer = subprocess.run(
        [sys.executable, SCRIPT, "--arch", str(arch), "--json", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert answer.stdout, answer.stderr[-2000:]
    launches = json.loads(answer.stdout)["launches"]
    names = {launch["name"] for launch in launches}
    assert names >= {"decode D128", "prefill D128", "plan", "combine", "prepare_qkv", "rms_norm", "gated_act", "sample"}
    assert ("decode D128 fp8" in names) == (arch >= 90)
    for launch in launches:
        assert not launch["problems"], launch
    assert answer.returncode == 0
