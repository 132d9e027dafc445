"""Every shipped launch compiles for every GPU generation, fits into it, and keeps its promises about instructions.

In a process of its own: here Triton interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_quant.py"


def launches(cache, *arguments):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, SCRIPT, "--json", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.stdout, answer.stderr[-2000:]
    found = json.loads(answer.stdout)["launches"]
    for launch in found:
        assert not launch["problems"], launch
    assert answer.returncode == 0
    return {launch["name"]: launch for launch in found}


def test_the_main_launches_compile_for_hopper(tmp_path):
    found = launches(tmp_path, "--arch", "90", "--quick")
    assert 2 < found["few 16 rows, 4 bits by 128"]["per_weight"] <= 3.2
    assert found["more 128 rows, 4 bits by 128"]["tensor_core"] >= 8


@pytest.mark.kernels
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_all_launches_compile(arch, tmp_path):
    found = launches(tmp_path, "--arch", str(arch))
    assert set(found) >= {"few 32 rows, 8 bits by 128", "more 64 rows, 4 bits by 128", "dequantize 4 bits"}
