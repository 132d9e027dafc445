"""The GPU's engine benchmark on a CPU, with a tiny shape: what a machine with a GPU then only has to start."""

import importlib.util
import json
import re
import subprocess
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
    monkeypatch.setattr("sys.argv", ["gpu_engine.py", "--table", str(figures), str(tmp_path / "none.json")])
    benchmark.main()
    assert capsys.readouterr().out == table[table.index("        ") :]
    assert "decode 3" in table
    assert "vllm TRITON_ATTN: TRITON_ATTN 64" in table


def test_the_check_of_a_gpu_is_a_valid_script_within_nine_minutes():
    script = ROOT / "scripts" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    (deadline,) = re.findall(r"^deadline=\$\(\(SECONDS \+ (\d+)\)\)$", text, re.MULTILINE)
    (grace,) = re.findall(r"timeout -s INT -k (\d+) \"\$limit\"", text)
    assert int(deadline) + int(grace) < 9 * 60
    assert '[ "$limit" -le "$left" ] || limit=$left' in text
