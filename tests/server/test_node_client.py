"""OpenAI's client for Node against a running server, if QUIRE_NODE_TESTS=1: it comes from npm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "node"


@pytest.mark.skipif(
    os.environ.get("QUIRE_NODE_TESTS") != "1" or shutil.which("npm") is None,
    reason="Node 20 and npm are needed, which fetches the package openai: QUIRE_NODE_TESTS=1 pytest tests/server",
)
def test_the_suite(server, tmp_path):
    for file in SUITE.iterdir():
        shutil.copy(file, tmp_path)
    fetch = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    subprocess.run(fetch, cwd=tmp_path, check=True)
    suite = subprocess.run(
        ["node", "--test", "--test-reporter=tap"],
        cwd=tmp_path,
        env={**os.environ, "QUIRE_TEST_URL": server},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert "# pass 8" in suite.stdout
