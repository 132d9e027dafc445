"""The GPU's engine benchmark on a CPU, with a tiny shape: what a machine with a GPU then only has to start."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quire.loader.load

ROOT = Path(__file__).parents[2]
PEER = """
import json, sys
config = json.load(open(sys.argv[1] + "/config.json"))
print("RESULT", sys.argv[2], config["hidden_size"])
"""


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_engine", ROOT / "benchmarks" / "gpu_engine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(quire.loader.load, "read_tensors", quire.loader.load.read_tensors)  # put back at the end
    return module


def test_a_tiny_shape_runs_through(benchmark, tmp_path, monkeypatch, capsys):
    peer, figures = tmp_path / "peer.py", tmp_path / "figures.json"
    peer.write_text(PEER)
    arguments = f"--shape tiny --device cpu --batches 1,3 --context 9 --steps 5 --requests 1 --json {figures}"
    arguments += f" --peer {peer} --peer-path {tmp_path} --option async_scheduling=true"
    monkeypatch.setattr("sys.argv", ["gpu_engine.py", *arguments.split()])
    benchmark.main()
    result = json.loads(figures.read_text())["shapes"]["tiny"]
    assert result["config"]["async_scheduling"] == "true" or result["config"]["async_scheduling"] is True
    assert 100 <= result["throughput"]["output tokens"] <= 1024
    for batch in (1, 3):
        row = result[f"decode {batch}"]
        assert row["host ms"] > 0
        assert row["ms"] > row["schedule ms"] > 0
    assert result["vllm FLASH_ATTN"]["lines"] == ["FLASH_ATTN 64"]
    table = capsys.readouterr().out
    assert "decode 3" in table
    assert "vllm TRITON_ATTN: TRITON_ATTN 64" in table


def test_the_checks_table_has_every_part(tmp_path):
    """What was measured, what failed, and the engine's figures of several files as one table; all of it as JSON too."""
    figures = {"throughput": {"output tokens": 9, "s": 3.0, "tok/s": 3.0}}
    peer = {"vllm FLASH_ATTN": {"lines": ["throughput 5"], "exit code": 0, "errors": ""}}
    for name, found in (("engine_small", figures), ("vllm_FLASH_ATTN", peer)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"shapes": {"tiny": found}}))
    (tmp_path / "parts.txt").write_text("engine_small 12 0\nvllm_FLASH_ATTN 9 0\nkernels 60 124\ntests 4 1\n")
    (tmp_path / "kernels.txt").write_text("copy    GB/s 4300\ndecode 1 x 1024    us 7\n")
    (tmp_path / "tests.txt").write_text("..F\n1 failed, 2 passed in 4 s\n\n")
    (tmp_path / "failed.txt").write_text("kernels: exit code 124\n")
    answer = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_table.py", tmp_path], capture_output=True, text=True, check=True
    )
    for line in (
        r"kernels +60 +124 ",
        r"tests +4 +1  1 failed, 2 passed in 4 s",
        r"decode 1 x 1024 +us 7",
        r"kernels: exit code 124",
        r"tiny +throughput +3   9 tokens in 3.0 s",
        r"tiny +vllm FLASH_ATTN: throughput 5",
    ):
        assert re.search(f"^{line}", answer.stdout, re.MULTILINE), answer.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["vllm_FLASH_ATTN"]["figures"]["shapes"]["tiny"] == peer
    assert summary["parts"]["tests"] == {"seconds": 4, "exit code": 1, "last line": "1 failed, 2 passed in 4 s"}
    assert summary["failed"] == ["kernels: exit code 124"]


def test_the_check_of_a_gpu_is_a_valid_script_within_nine_minutes():
    script = ROOT / "scripts" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    (deadline,) = re.findall(r"^deadline=\$\(\(SECONDS \+ (\d+)\)\)$", text, re.MULTILINE)
    (grace,) = re.findall(r"timeout -s INT -k (\d+) \"\$limit\"", text)
    assert int(deadline) + int(grace) < 9 * 60
    assert '[ "$limit" -le "$left" ] || limit=$left' in text
